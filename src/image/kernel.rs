//! Which kernel of an image boots it, and which initrd belongs to that kernel.

use std::cmp::Ordering;

/// The largest kernel and initrd that are taken out of an image, in bytes.
pub(crate) const MAX_KERNEL: u64 = 256 << 20;
pub(crate) const MAX_INITRD: u64 = 1 << 30;

/// Chooses among the names in /boot: the kernel with the newest version, and its initrd.
///
/// The names are those of Debian (`vmlinuz-V`, `initrd.img-V`), Fedora (`initramfs-V.img`), SUSE (`initrd-V`) and
/// Alpine (`vmlinuz-virt`, `initramfs-virt`); the plain `vmlinuz` of custom images comes last.
pub(crate) fn choose(names: &[String]) -> Option<(String, Option<String>)> {
    let version = |name: &str| {
        let version = name.strip_prefix("vmlinuz-").or_else(|| name.strip_prefix("vmlinux-"));
        version.or_else(|| name.strip_prefix("Image-")).map(str::to_string)
    };
    let newest = names
        .iter()
        .filter_map(|name| Some((version(name)?, name)))
        .filter(|(version, _)| !version.contains("rescue") && !version.ends_with(".old"))
        .max_by(|(a, name_a), (b, name_b)| compare_versions(a, b).then_with(|| name_a.cmp(name_b)));
    if let Some((version, kernel)) = newest {
        let candidates = [
            format!("initrd.img-{version}"),
            format!("initramfs-{version}.img"),
            format!("initramfs-{version}"),
            format!("initrd-{version}"),
            format!("initrd-{version}.img"),
        ];
        return Some((kernel.clone(), candidates.into_iter().find(|name| names.contains(name))));
    }
    let has = |wanted: &&str| names.iter().any(|name| name == wanted);
    let kernel = ["vmlinuz", "vmlinux", "Image", "bzImage"].into_iter().find(has)?;
    let initrd = ["initrd.img", "initrd", "initramfs.img", "initramfs"].into_iter().find(has);
    Some((kernel.to_string(), initrd.map(str::to_string)))
}

/// Compares versions as people count: 6.9 comes before 6.10, and 6.1~rc1 before 6.1.
pub(crate) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (number_a, rest_a) = split_number(a);
        let (number_b, rest_b) = split_number(b);
        let order = number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b));
        if order != Ordering::Equal {
            return order;
        }
        let rank = |byte: Option<&u8>| match byte {
            Some(b'~') => 0,
            None => 1,
            Some(byte) => 2 + u32::from(*byte),
        };
        let order = rank(rest_a.first()).cmp(&rank(rest_b.first()));
        if order != Ordering::Equal || rest_a.is_empty() {
            return order;
        }
        (a, b) = (rest_a.get(1..).unwrap_or_default(), rest_b.get(1..).unwrap_or_default());
    }
}

/// The digits at the start, without leading zeros, and what follows.
fn split_number(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let zeros = digits.iter().take_while(|byte| **byte == b'0').count();
    (digits.get(zeros..).unwrap_or_default(), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Option<(String, Option<String>)> {
        choose(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>())
    }

    fn pair(kernel: &str, initrd: &str) -> Option<(String, Option<String>)> {
        Some((kernel.into(), (!initrd.is_empty()).then(|| initrd.into())))
    }

    #[test]
    fn the_newest_kernel_and_its_initrd_are_chosen() {
        let debian = [
            "config-6.1.0-9-amd64",
            "vmlinuz-6.1.0-9-amd64",
            "initrd.img-6.1.0-9-amd64",
            "vmlinuz",
            "vmlinuz-6.1.0-31-amd64",
            "initrd.img-6.1.0-31-amd64",
            "initrd.img",
        ];
        assert_eq!(chosen(&debian), pair("vmlinuz-6.1.0-31-amd64", "initrd.img-6.1.0-31-amd64"));
        assert_eq!(
            chosen(&["vmlinuz-0-rescue-abc", "vmlinuz-6.9.4.fc40", "initramfs-6.9.4.fc40.img"]),
            pair("vmlinuz-6.9.4.fc40", "initramfs-6.9.4.fc40.img")
        );
        assert_eq!(chosen(&["vmlinuz-virt", "initramfs-virt"]), pair("vmlinuz-virt", "initramfs-virt"));
        assert_eq!(chosen(&["vmlinuz-6.2", "initrd.img-6.1"]), pair("vmlinuz-6.2", ""));
        assert_eq!(chosen(&["vmlinuz", "initrd.img"]), pair("vmlinuz", "initrd.img"));
        assert_eq!(chosen(&["grub", "System.map-6.1"]), None);
    }

    #[test]
    fn versions_compare_as_people_count() {
        let sorted = ["5.19.0-50", "6.1~rc1", "6.1", "6.1.0", "6.1.0-9", "6.1.0-10", "6.9", "6.10", "6.10a", "10"];
        for (at, a) in sorted.iter().enumerate() {
            for (other, b) in sorted.iter().enumerate() {
                assert_eq!(compare_versions(a, b), at.cmp(&other), "{a} {b}");
            }
        }
        assert_eq!(compare_versions("6.01", "6.1"), Ordering::Equal);
    }
}
