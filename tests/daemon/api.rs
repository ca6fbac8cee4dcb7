//! The API's description, and the server: a program makes requests of the one and compares the other's answers with it.

use std::path::Path;

use crate::lab::{Lab, Process, UID, wait};

const DESCRIPTION: &str = "packaging/puterd.openapi.json";

#[test]
#[ignore = "needs root"]
fn puterd_answers_as_its_description_says() {
    let lab = Lab::new();
    // The widest subnet has every id.
    let _daemon = lab.start(&["--subnet", "10.0.0.1/8"]);
    let mut bridge = lab.as_user(UID, &[]);
    let socket = format!("UNIX-CONNECT:{}", lab.socket().display());
    let _bridge = Process(bridge.args(["socat", "TCP-LISTEN:8099,bind=127.0.0.1,fork", &socket]).spawn().unwrap());
    wait("the way to the socket is there", || lab.host("ss -Hltn").contains(":8099 "));
    let program = std::env::var("PUTER_TEST_SCHEMATHESIS").expect("PUTER_TEST_SCHEMATHESIS is set by xtask");
    let mut command = lab.enter(lab.host_holder());
    command.current_dir(lab.dir.path()).arg(program).arg("run");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(DESCRIPTION)).args(["--url", "http://127.0.0.1:8099"]);
    // A number may be written with a fraction of zero, says JSON Schema; serde reads none such as an integer.
    command.args(["--checks", "all", "--exclude-checks", "positive_data_acceptance"]);
    let output = command.args(["--seed", "1", "--max-examples", "15", "--no-color"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("Tested: 5"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
