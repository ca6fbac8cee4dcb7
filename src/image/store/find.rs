//! What is in the store, and which of it people mean.

use anyhow::{Context, Result, anyhow};

use super::{Digest, Image, Reference, Store, unnamed};
use crate::hint::Hint;

/// Fewer digits of a digest than this name nothing: a word such as `cafe` is rather a name.
const LEAST_DIGITS: usize = 4;

/// Something in the store that takes room as an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The directory's name.
    pub digest: Digest,
    /// The references that name it, sorted; none where the tag has moved on.
    pub names: Vec<Reference>,
    /// None where its files are damaged or of another version of puter: a pull makes it anew.
    pub image: Option<Image>,
    /// Bytes of storage that it takes.
    pub used: u64,
}

/// An image of the store as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// By a name that it has.
    Name(Reference, Digest),
    /// By its digest, or the begin of it.
    Digest(Digest),
}

impl Target {
    /// The image's digest.
    pub fn digest(&self) -> &Digest {
        match self {
            Target::Name(_, digest) | Target::Digest(digest) => digest,
        }
    }

    /// The name, where it was asked for by one.
    pub fn name(&self) -> Option<&Reference> {
        match self {
            Target::Name(name, _) => Some(name),
            Target::Digest(_) => None,
        }
    }
}

impl Store {
    /// Everything in the store, each once.
    pub fn kept(&self) -> Result<Vec<Kept>> {
        let mut names = self.names()?;
        let mut kept = Vec::new();
        for digest in self.digests()? {
            let names = names.remove(&digest).unwrap_or_default();
            let image = self.by_digest(&digest, Some(names.first().cloned().unwrap_or_else(|| unnamed(&digest))))?;
            // Another command may have taken it away meanwhile.
            if image.is_some() || self.directory.disk(&digest).exists() {
                kept.push(Kept { digest, names, image, used: self.usage(&digest) });
            }
        }
        Ok(kept)
    }

    /// All images, each once per reference that names it, in the order of their names.
    pub fn list(&self) -> Result<Vec<Image>> {
        let mut images = vec![];
        for Kept { image, names, .. } in self.kept()? {
            let Some(image) = image else { continue };
            match names.is_empty() {
                true => images.push(image),
                false => images.extend(names.into_iter().map(|reference| Image { reference, ..image.clone() })),
            }
        }
        images.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(images)
    }

    /// The image that people mean: by its name as docker writes it, by `name@sha256:…`, by `sha256:…` or the begin of a
    /// digest that no other has.
    ///
    /// # Errors
    /// When nothing or more than one thing is called so.
    pub fn find(&self, text: &str) -> Result<Target> {
        let digests = self.digests()?;
        let absent = || anyhow!("there is no image '{}' here", super::super::digest::clip(text));
        let hint = "`puter image list` shows those that are";
        if text.starts_with("sha256:") {
            return by_digits(text, &digests).unwrap_or_else(|| Err(absent()).hint(hint));
        }
        let parsed = text.parse::<Reference>();
        if let Ok(reference) = &parsed {
            let reference = reference.absolute().context("cannot find the working directory")?;
            let named = self.names()?.into_iter().find(|(_, names)| names.contains(&reference));
            if let Some((digest, _)) = named.filter(|(digest, _)| digests.contains(digest)) {
                return Ok(Target::Name(reference, digest));
            }
            if let Reference::Registry(pinned) = &reference
                && let Some(digest) = pinned.digest.filter(|digest| digests.contains(digest))
            {
                return Ok(Target::Digest(digest));
            }
        }
        match (by_digits(text, &digests), parsed) {
            (Some(found), _) => found,
            (None, Ok(_)) => Err(absent()).hint(hint),
            (None, Err(why)) => Err(anyhow!(why)).hint(hint),
        }
    }

    /// Whether the cache has this layer.
    pub fn has_layer(&self, layer: &super::LayerId) -> bool {
        layer.digest.is_some_and(|digest| self.directory.has_blob(&digest, layer.size))
    }
}

/// The digest that begins so; `None` where none does or the text is no begin of one.
fn by_digits(text: &str, digests: &[Digest]) -> Option<Result<Target>> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let plain = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !plain || digits.len() < LEAST_DIGITS {
        return None;
    }
    let found: Vec<&Digest> = digests.iter().filter(|digest| digest.hex().starts_with(digits)).collect();
    match found.as_slice() {
        [] => None,
        [one] => Some(Ok(Target::Digest(**one))),
        many => {
            let all: Vec<String> = many.iter().map(|digest| digest.short()).collect();
            Some(
                Err(anyhow!("{} images have a digest that begins with '{digits}': {}", many.len(), all.join(", ")))
                    .hint("give more of its digits"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_begin_of_a_digest_names_the_one_image_that_has_it() {
        let digest = |begin: &str| format!("sha256:{begin:0<64}").parse::<Digest>().unwrap();
        let all = [digest("abcd1"), digest("abcd2"), digest("beef")];
        for (text, found) in [("abcd1", Some(0)), ("sha256:abcd2", Some(1)), ("beef", Some(2)), ("bee", None)] {
            let expected = found.map(|at: usize| Target::Digest(all[at]));
            assert_eq!(by_digits(text, &all).map(Result::unwrap), expected, "{text}");
        }
        let error = by_digits("abcd", &all).unwrap().unwrap_err();
        assert!(error.to_string().starts_with("2 images have a digest that begins with 'abcd'"), "{error}");
        for none in ["", "sha256:", "debian", "abce", "ABCD1", "abcd1x"] {
            assert!(by_digits(none, &all).is_none(), "{none}");
        }
        assert_eq!(by_digits(&all[0].to_string(), &all).unwrap().unwrap(), Target::Digest(all[0]));
    }
}
