//! The HTTP API without HTTP: a method, a path and a body in, a status and a body out.

use serde::Serialize;

use crate::protocol::address::{MAX_ID, check_vm_name};
use crate::protocol::daemon::{ErrorBody, ErrorDetail, Lease, Status, Tap, TapRequest};

/// What stands behind the API.
pub trait Backend: Send + Sync {
    /// Makes a VM's TAP or finds the one that it has.
    ///
    /// # Errors
    /// With the status and code of the answer, as all of this trait.
    fn ensure(&self, request: &TapRequest) -> Result<Tap, ApiError>;
    /// All TAPs, by id.
    ///
    /// # Errors
    /// See [`Backend::ensure`].
    fn list(&self) -> Result<Vec<Tap>, ApiError>;
    /// Removes a VM's TAP.
    ///
    /// # Errors
    /// See [`Backend::ensure`].
    fn remove(&self, vm: &str) -> Result<(), ApiError>;
    /// How puterd does.
    ///
    /// # Errors
    /// See [`Backend::ensure`].
    fn status(&self) -> Result<Status, ApiError>;
    /// The addresses that guests hold.
    ///
    /// # Errors
    /// See [`Backend::ensure`].
    fn leases(&self) -> Result<Vec<Lease>, ApiError>;
}

/// An error with the answer's status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status, 400 or above.
    pub status: u16,
    /// A word for programs.
    pub code: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl ApiError {
    /// An error with this status, code and message.
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, code, message: message.into() }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    /// The methods that the path knows, where the request's is not one of them.
    pub allow: Option<&'static str>,
    /// JSON, or nothing for the status 204.
    pub body: Vec<u8>,
}

impl Reply {
    fn json(value: &impl Serialize) -> Reply {
        match serde_json::to_vec(value) {
            Ok(body) => Reply { status: 200, allow: None, body },
            Err(error) => ApiError::new(500, "internal", format!("cannot write the answer: {error}")).into(),
        }
    }
}

impl From<ApiError> for Reply {
    fn from(error: ApiError) -> Reply {
        let detail = ErrorDetail { code: error.code.to_owned(), message: error.message };
        let body = serde_json::to_vec(&ErrorBody { error: detail }).unwrap_or_default();
        Reply { status: error.status, allow: None, body }
    }
}

/// Answers a request. May block: on the kernel, or on another request.
pub fn respond(method: &str, path: &str, body: &[u8], backend: &dyn Backend) -> Reply {
    let result = match (method, path) {
        ("GET", "/v1/status") => backend.status().map(|s| Reply::json(&s)),
        ("GET", "/v1/taps") => backend.list().map(|t| Reply::json(&t)),
        ("GET", "/v1/leases") => backend.leases().map(|l| Reply::json(&l)),
        ("POST", "/v1/taps") => parse(body).and_then(|request| backend.ensure(&request)).map(|t| Reply::json(&t)),
        (_, "/v1/status" | "/v1/leases") => return not_allowed(method, path, "GET"),
        (_, "/v1/taps") => return not_allowed(method, path, "GET, POST"),
        _ => match path.strip_prefix("/v1/taps/") {
            Some(vm) if method == "DELETE" => checked(vm).and_then(|()| backend.remove(vm)).map(|()| Reply {
                status: 204,
                allow: None,
                body: Vec::new(),
            }),
            Some(_) => return not_allowed(method, path, "DELETE"),
            None => Err(ApiError::new(404, "not_found", format!("puterd has no '{}'", path.escape_debug()))),
        },
    };
    result.unwrap_or_else(Reply::from)
}

fn parse(body: &[u8]) -> Result<TapRequest, ApiError> {
    let request: TapRequest = serde_json::from_slice(body)
        .map_err(|e| ApiError::new(400, "invalid_json", format!("the body is no request for a TAP: {e}")))?;
    checked(&request.vm)?;
    if let Some(member) = &request.member {
        member.check().map_err(|e| ApiError::new(400, "invalid_name", e))?;
    }
    if request.id == 0 || request.id > MAX_ID {
        let message = format!("the id is {}; ids are 1 to {MAX_ID}, and fewer in most subnets", request.id);
        return Err(ApiError::new(400, "invalid_id", message));
    }
    Ok(request)
}

fn checked(vm: &str) -> Result<(), ApiError> {
    check_vm_name(vm).map_err(|e| ApiError::new(400, "invalid_name", e))
}

fn not_allowed(method: &str, path: &str, allow: &'static str) -> Reply {
    let message = format!("{} does not take {}; it takes {allow}", path.escape_debug(), method.escape_debug());
    Reply { allow: Some(allow), ..ApiError::new(405, "method_not_allowed", message).into() }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::protocol::address::{Mac, Subnet, tap_name};

    /// Keeps its TAPs in memory.
    struct Memory(Mutex<Vec<Tap>>);

    impl Backend for Memory {
        fn ensure(&self, request: &TapRequest) -> Result<Tap, ApiError> {
            let tap = Tap {
                vm: request.vm.clone(),
                id: request.id,
                name: tap_name(&request.vm),
                mac: Mac::of_id(request.id),
                ip: Subnet::default().address(request.id).unwrap(),
                ip6: None,
                isolated: request.isolated,
                attached: false,
            };
            self.0.lock().unwrap().push(tap.clone());
            Ok(tap)
        }

        fn list(&self) -> Result<Vec<Tap>, ApiError> {
            Ok(self.0.lock().unwrap().clone())
        }

        fn remove(&self, vm: &str) -> Result<(), ApiError> {
            let mut taps = self.0.lock().unwrap();
            let at = taps.iter().position(|t| t.vm == vm);
            at.map(|at| drop(taps.remove(at))).ok_or_else(|| ApiError::new(404, "no_such_tap", vm))
        }

        fn status(&self) -> Result<Status, ApiError> {
            Err(ApiError::new(500, "internal", "no status in memory"))
        }

        fn leases(&self) -> Result<Vec<Lease>, ApiError> {
            Ok(Vec::new())
        }
    }

    fn code(reply: &Reply) -> String {
        serde_json::from_slice::<ErrorBody>(&reply.body).unwrap().error.code
    }

    #[test]
    fn taps_are_made_listed_and_removed() {
        let backend = Memory(Mutex::default());
        let made = respond("POST", "/v1/taps", br#"{"vm":"web","id":1,"later":true}"#, &backend);
        assert_eq!(made.status, 200);
        let tap: Tap = serde_json::from_slice(&made.body).unwrap();
        assert_eq!((tap.name.as_str(), tap.isolated), ("pt-web", false));
        let all: Vec<Tap> = serde_json::from_slice(&respond("GET", "/v1/taps", b"", &backend).body).unwrap();
        assert_eq!(all, [tap]);
        let gone = respond("DELETE", "/v1/taps/web", b"", &backend);
        assert_eq!((gone.status, gone.body.len()), (204, 0));
        let twice = respond("DELETE", "/v1/taps/web", b"", &backend);
        assert_eq!((twice.status, code(&twice).as_str()), (404, "no_such_tap"));
    }

    #[test]
    fn bad_requests_get_the_right_status_and_reach_no_tap() {
        let backend = Memory(Mutex::default());
        for (method, path, body, status, expected) in [
            ("POST", "/v1/taps", "", 400, "invalid_json"),
            ("POST", "/v1/taps", "[]", 400, "invalid_json"),
            ("POST", "/v1/taps", r#"{"vm":"web","id":-1}"#, 400, "invalid_json"),
            ("POST", "/v1/taps", r#"{"vm":"web","id":4294967296}"#, 400, "invalid_json"),
            ("POST", "/v1/taps", "\u{fffd}", 400, "invalid_json"),
            ("POST", "/v1/taps", r#"{"vm":"web","id":0}"#, 400, "invalid_id"),
            ("POST", "/v1/taps", r#"{"vm":"../x","id":1}"#, 400, "invalid_name"),
            ("POST", "/v1/taps", r#"{"vm":"a:1:1","id":1}"#, 400, "invalid_name"),
            ("POST", "/v1/taps", r#"{"vm":"a","id":1,"member":{"cluster":"c:1","member":"m"}}"#, 400, "invalid_name"),
            ("POST", "/v1/taps", r#"{"vm":"a","id":1,"member":{"cluster":"c"}}"#, 400, "invalid_json"),
            ("DELETE", "/v1/taps/", "", 400, "invalid_name"),
            ("DELETE", "/v1/taps/%2e", "", 400, "invalid_name"),
            ("PUT", "/v1/taps", "", 405, "method_not_allowed"),
            ("GET", "/v1/taps/web", "", 405, "method_not_allowed"),
            ("DELETE", "/v1/status", "", 405, "method_not_allowed"),
            ("GET", "/", "", 404, "not_found"),
            ("GET", "/v2/status", "", 404, "not_found"),
            ("GET", "*", "", 404, "not_found"),
        ] {
            let reply = respond(method, path, body.as_bytes(), &backend);
            assert_eq!((reply.status, code(&reply).as_str()), (status, expected), "{method} {path} {body}");
            assert_eq!(reply.allow.is_some(), status == 405);
        }
        assert!(backend.0.lock().unwrap().is_empty());
    }
}
