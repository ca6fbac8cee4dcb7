//! What the host's lines say, without doing any of it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;

use crate::protocol::agent::{
    BAD_REQUEST, Call, Error, Input, Response, UNKNOWN_METHOD, UNSUPPORTED_VERSION, VERSION, Window,
};

/// The methods of [`Call`].
const METHODS: [&str; 4] = ["ping", "configure", "shutdown", "exec"];

#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    id: u64,
    #[serde(default)]
    version: u32,
    #[serde(default)]
    method: String,
}

/// Reads a request: its id, and what is asked.
///
/// # Errors
/// The answer to a line that is none, or that this agent cannot do.
pub fn read(line: &[u8]) -> Result<(u64, Call), Box<Response>> {
    let bad = |id, message| Box::new(refusal(id, BAD_REQUEST, message));
    let mut value: Value =
        serde_json::from_slice(line).map_err(|error| bad(0, format!("the line is not JSON: {error}")))?;
    // serde would take a list for a structure as well.
    let Some(request) = value.as_object_mut() else {
        return Err(bad(0, "the line is no request: it is no object".into()));
    };
    let envelope = Envelope::deserialize(&*request);
    let envelope = envelope.map_err(|error| bad(0, format!("the line is no request: {error}")))?;
    let id = envelope.id;
    if envelope.version > VERSION {
        let why = format!("version {} is not known; this agent speaks {VERSION}", envelope.version);
        return Err(Box::new(refusal(id, UNSUPPORTED_VERSION, why)));
    }
    if !METHODS.contains(&envelope.method.as_str()) {
        let name: String = envelope.method.chars().take(64).collect();
        let why = format!("this agent does not know the method '{name}'");
        return Err(Box::new(refusal(id, UNKNOWN_METHOD, why)));
    }
    // A method that takes nothing may be asked without `params`.
    request.entry("params").or_insert_with(|| Value::Object(Default::default()));
    let call = Call::deserialize(&*request);
    call.map(|call| (id, call)).map_err(|error| bad(id, format!("the parameters do not fit: {error}")))
}

/// The answer that tells of an error.
pub fn refusal(id: u64, code: &str, message: String) -> Response {
    Response { id, result: None, error: Some(Error { code: code.into(), message }) }
}

/// What the host does to a program that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    Bytes(Vec<u8>),
    End,
    Resize(Window),
}

/// Reads a line for a program that runs; `None` where it is nonsense.
pub fn typed(line: &[u8]) -> Option<Typed> {
    Some(match serde_json::from_slice(line).ok()? {
        Input::Stdin(text) => Typed::Bytes(STANDARD.decode(text).ok()?),
        Input::StdinEnd => Typed::End,
        Input::Resize(window) => Typed::Resize(window),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_request_or_has_its_answer() {
        assert_eq!(read(br#"{"id":7,"method":"ping"}"#), Ok((7, Call::Ping {})));
        for (line, id, code) in [
            ("{\"id\":7", 0, BAD_REQUEST),
            ("[]", 0, BAD_REQUEST),
            (r#"{"id":7,"method":"dance"}"#, 7, UNKNOWN_METHOD),
            (r#"{"id":7,"version":2,"method":"ping"}"#, 7, UNSUPPORTED_VERSION),
            (r#"{"id":7,"method":"exec","params":{"command":1}}"#, 7, BAD_REQUEST),
        ] {
            let refused = read(line.as_bytes()).unwrap_err();
            assert_eq!((refused.id, refused.error.unwrap().code.as_str()), (id, code), "{line}");
        }
    }

    #[test]
    fn what_is_typed_is_read_and_nonsense_is_not() {
        assert_eq!(typed(br#"{"stdin":"aGk="}"#), Some(Typed::Bytes(b"hi".to_vec())));
        assert_eq!(typed(br#""stdin_end""#), Some(Typed::End));
        assert_eq!(typed(br#"{"resize":{"rows":1,"columns":2}}"#), Some(Typed::Resize(Window { rows: 1, columns: 2 })));
        for bad in [&br#"{"stdin":"%"}"#[..], b"{}", b"", br#"{"resize":{"rows":70000,"columns":2}}"#] {
            assert_eq!(typed(bad), None, "{}", bad.escape_ascii());
        }
    }
}
