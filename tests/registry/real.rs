//! Pulls from a real registry, with images that skopeo pushed there.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use puter::image::{Digest, Image, PullOptions, Store};

use super::child::in_a_child;
use super::image::{ARCHITECTURE, Sample, entry, files, gzip, noise, options, pull, tar};
use super::odds::check_sample;

const USER: &str = "tester";
const PASSWORD: &str = "correct:horse";

/// A docker-registry on loopback, ended with the test.
pub struct Registry {
    pub address: String,
    child: Child,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// `extra` is added to its configuration.
    pub fn start(directory: &Path, extra: &str) -> Registry {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let storage = directory.join("registry");
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n{extra}",
            storage.display()
        );
        let http = format!("http: {{addr: '{address}'");
        let config = match config.contains("http: {") {
            true => config.replace("http: {", &format!("{http}, ")),
            false => format!("{config}\n{http}}}\n"),
        };
        let path = directory.join("registry.yml");
        std::fs::write(&path, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry must be installed");
        let mut registry = Registry { address, child };
        for _ in 0..400 {
            if TcpStream::connect(&registry.address).is_ok() {
                return registry;
            }
            assert!(registry.child.try_wait().unwrap().is_none(), "docker-registry ended at once");
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("docker-registry does not listen");
    }

    fn with_login(directory: &Path) -> Registry {
        let made =
            Command::new("htpasswd").args(["-nbB", USER, PASSWORD]).output().expect("htpasswd must be installed");
        let path = directory.join("htpasswd");
        std::fs::write(&path, made.stdout).unwrap();
        Registry::start(directory, &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}", path.display()))
    }

    pub fn push(&self, from: &str, name: &str, arguments: &[&str]) {
        let to = format!("docker://{}/{name}", self.address);
        skopeo(&[&["--dest-tls-verify=false", "--dest-creds", &format!("{USER}:{PASSWORD}")], arguments, &[from, &to]]);
    }
}

fn skopeo(arguments: &[&[&str]]) {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet"]).args(arguments.concat());
    let output = command.output().expect("skopeo must be installed");
    assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
}

/// Writes an OCI layout with an image for each architecture, whose layers are not compressed.
pub struct Layout {
    directory: PathBuf,
    manifests: Vec<String>,
}

impl Layout {
    pub fn new(directory: &Path) -> Layout {
        std::fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout { directory: directory.to_path_buf(), manifests: vec![] }
    }

    fn blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes);
        std::fs::write(self.directory.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        format!(r#""digest":"{digest}","size":{}"#, bytes.len())
    }

    pub fn add(&mut self, architecture: &str, layers: &[Vec<u8>]) {
        let list: Vec<_> = layers.iter().map(|layer| format!("\"{}\"", Digest::of(layer))).collect();
        let config = format!(
            r#"{{"architecture":"{architecture}","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            list.join(",")
        );
        let media = "application/vnd.oci.image.layer.v1.tar";
        let list: Vec<_> =
            layers.iter().map(|layer| format!(r#"{{"mediaType":"{media}",{}}}"#, self.blob(layer))).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json",{}}},"layers":[{}]}}"#,
            self.blob(config.as_bytes()),
            list.join(",")
        );
        self.manifests.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json",{},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#,
            self.blob(manifest.as_bytes())
        ));
    }

    /// Tags an index of all images, and returns the layout as skopeo and puter name it.
    pub fn finish(&self, tag: &str) -> String {
        let index = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}}"#,
            self.manifests.join(",")
        );
        let top = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json",{},"annotations":{{"org.opencontainers.image.ref.name":"{tag}"}}}}]}}"#,
            self.blob(index.as_bytes())
        );
        std::fs::write(self.directory.join("index.json"), top).unwrap();
        format!("oci:{}:{tag}", self.directory.display())
    }
}

/// The sample's layer, and two more above it.
fn layers() -> Vec<Vec<u8>> {
    let base = gzip_free(&Sample::new());
    let second = tar(&[entry("second", b'0', 0o644, "", &noise(400_000))]);
    let third = tar(&[entry(".wh.second", b'0', 0o644, "", b""), entry("third", b'0', 0o644, "", b"3")]);
    vec![base, second, third]
}

pub fn gzip_free(sample: &Sample) -> Vec<u8> {
    let mut bytes = vec![];
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&sample.layer[..]), &mut bytes).unwrap();
    bytes
}

/// That the disk is a sound file system with what the layers say.
fn check_disk(image: &Image) {
    check_sample(image);
    let disk = image.disk.to_str().unwrap();
    let check = Command::new("e2fsck").args(["-fn", disk]).output().expect("e2fsck must be installed");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let list = Command::new("debugfs").args(["-R", "ls -p /", disk]).output().unwrap();
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.contains("/third/") && !list.contains("/second/"), "{list}");
}

#[test]
#[ignore = "needs root"]
fn every_form_of_an_image_becomes_the_same_machine() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), "");
    let mut layout = Layout::new(&directory.path().join("layout"));
    layout.add("riscv64", &[tar(&[entry("other", b'0', 0o644, "", b"machine")])]);
    layout.add(ARCHITECTURE, &layers());
    let from = layout.finish("v1");
    registry.push(&from, "all:index", &["--all"]);
    let one = ["--override-arch", ARCHITECTURE];
    registry.push(&from, "team/app:oci", &one);
    registry.push(&from, "team/app:docker", &[&one[..], &["--format", "v2s2"]].concat());
    // In a registry of its own, or skopeo would use the layers that it finds compressed already.
    std::fs::create_dir(directory.path().join("zstd")).unwrap();
    let other = Registry::start(&directory.path().join("zstd"), "");
    other.push(&from, "team/app:zstd", &[&one[..], &["--format", "oci", "--dest-compress-format", "zstd"]].concat());
    std::fs::create_dir(directory.path().join("chunked")).unwrap();
    let third = Registry::start(&directory.path().join("chunked"), "");
    let chunked = [&one[..], &["--format", "oci", "--dest-compress-format", "zstd:chunked"]].concat();
    third.push(&from, "team/app:chunked", &chunked);
    let archive = directory.path().join("app.tar");
    skopeo(&[&one, &[&from, &format!("docker-archive:{}:app:1", archive.display())]]);

    let mut disks = vec![];
    for (number, reference) in [
        format!("{}/all:index", registry.address),
        format!("{}/team/app:oci", registry.address),
        format!("{}/team/app:docker", registry.address),
        format!("{}/team/app:zstd", other.address),
        format!("{}/team/app:chunked", third.address),
        from.clone(),
        format!("docker-archive:{}", archive.display()),
        format!("docker-archive:{}:app:1", archive.display()),
    ]
    .iter()
    .enumerate()
    {
        let store = directory.path().join(format!("store-{number}"));
        let image = pull(&store, reference, &options()).unwrap_or_else(|error| panic!("{reference}: {error}"));
        check_disk(&image);
        assert_eq!(image.config().unwrap()["architecture"], ARCHITECTURE, "{reference}");
        disks.push(image.disk_size);
    }
    assert!(disks.windows(2).all(|pair| pair[0] == pair[1]), "{disks:?}");

    // That zstd was really on the way.
    let magic = |path: PathBuf| std::fs::read(path).unwrap()[..4].to_vec();
    for store in ["store-3", "store-4"] {
        let blobs = directory.path().join(store).join("blobs/sha256");
        let all: Vec<_> = std::fs::read_dir(&blobs).unwrap().map(|entry| magic(entry.unwrap().path())).collect();
        assert!(!all.is_empty() && all.iter().all(|magic| magic == &[0x28, 0xb5, 0x2f, 0xfd]), "{all:?}");
    }

    let error =
        pull(&directory.path().join("store-0"), &format!("{}/all:none", registry.address), &options()).unwrap_err();
    assert!(error.contains("there is no image 'all:none'") && error.contains("(manifest unknown)"), "{error}");
    let other = PullOptions { architecture: Some("s390x".into()), ..options() };
    let error =
        pull(&directory.path().join("store-0"), &format!("{}/all:index", registry.address), &other).unwrap_err();
    assert!(error.contains("not made for linux/s390x; it offers linux/"), "{error}");
}

#[test]
#[ignore = "needs root"]
fn a_pinned_digest_is_pulled_and_shared_layers_are_fetched_once() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), "");
    let mut layout = Layout::new(&directory.path().join("one"));
    layout.add(ARCHITECTURE, &layers()[..2]);
    registry.push(&layout.finish("v"), "app:1", &["--override-arch", ARCHITECTURE]);
    let mut layout = Layout::new(&directory.path().join("two"));
    layout.add(ARCHITECTURE, &layers());
    registry.push(&layout.finish("v"), "app:2", &["--override-arch", ARCHITECTURE]);
    let store = directory.path().join("store");
    let first = pull(&store, &format!("{}/app:1", registry.address), &options()).unwrap();
    let before = files(&store.join("blobs")).len();
    let second = pull(&store, &format!("{}/app:2", registry.address), &options()).unwrap();
    assert_eq!((before, files(&store.join("blobs")).len()), (2, 3));
    assert_ne!(first.digest, second.digest);
    let pinned = pull(&store, &format!("{}/app@{}", registry.address, first.digest), &options()).unwrap();
    assert_eq!((pinned.digest, &pinned.disk), (first.digest, &first.disk));
    let store = Store::open(&store).unwrap();
    assert_eq!(store.list().unwrap().len(), 3);
    assert!(store.cached() > 0 && store.usage(&first.digest) > 0);
    let keep = second.digest;
    let removed = store.prune(&|digest| Ok(if *digest == keep { vec!["a".into()] } else { vec![] })).unwrap();
    assert_eq!((removed.images.len(), removed.images[0].digest), (1, first.digest));
    assert_eq!(removed.images[0].names.len(), 2);
    assert_eq!((store.list().unwrap(), store.cached()), (vec![second.clone()], 0));
    check_disk(&second);
}

#[test]
#[ignore = "needs root"]
fn a_registry_with_passwords_wants_the_stored_login() {
    let directory = tempfile::tempdir().unwrap();
    let auth = directory.path().join("auth.json");
    let bin = directory.path().join("bin");
    let variables = [
        ("REGISTRY_AUTH_FILE", auth.display().to_string()),
        ("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())),
        ("HOME", directory.path().display().to_string()),
    ];
    let mut keep = None;
    let start = || {
        let registry = Registry::with_login(directory.path());
        let mut layout = Layout::new(&directory.path().join("layout"));
        layout.add(ARCHITECTURE, &layers());
        registry.push(&layout.finish("v"), "app:1", &["--override-arch", ARCHITECTURE]);
        std::fs::create_dir(&bin).unwrap();
        let arguments = vec![
            directory.path().display().to_string(),
            auth.display().to_string(),
            bin.display().to_string(),
            registry.address.clone(),
        ];
        keep = Some(registry);
        arguments
    };
    in_a_child("real::a_registry_with_passwords_wants_the_stored_login", &variables, start, |arguments| {
        let [directory, auth, bin, address] = arguments else { panic!("{arguments:?}") };
        let (store, reference) = (Path::new(directory).join("store"), format!("{address}/app:1"));
        let error = pull(&store, &reference, &options()).unwrap_err();
        assert!(error.contains(&format!("wants a login: log in with 'docker login {address}'")), "{error}");

        let login = |text: String| std::fs::write(auth, text).unwrap();
        let encoded = |password: &str| {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"))
        };
        login(format!(r#"{{"auths":{{"{address}":{{"auth":"{}"}}}}}}"#, encoded("wrong")));
        let error = pull(&store, &reference, &options()).unwrap_err();
        assert!(error.contains(&format!("refuses the stored login of '{USER}'")), "{error}");
        login("{".into());
        let error = pull(&store, &reference, &options()).unwrap_err();
        assert!(error.contains("auth.json: it is no valid auth file"), "{error}");
        assert_eq!(files(&store), [""; 0]);

        login(format!(r#"{{"auths":{{"{address}":{{"auth":"{}"}}}}}}"#, encoded(PASSWORD)));
        check_disk(&pull(&store, &reference, &options()).unwrap());

        let helper = Path::new(bin).join("docker-credential-puter-test");
        let script = |text: &str| {
            let mut file = std::fs::File::create(&helper).unwrap();
            write!(file, "#!/bin/sh\n[ \"$1\" = get ] || exit 9\nread -r server\n{text}\n").unwrap();
            file.set_permissions(PermissionsExt::from_mode(0o755)).unwrap();
        };
        login(format!(r#"{{"credHelpers":{{"{address}":"puter-test"}}}}"#));
        let refresh = PullOptions { refresh: true, ..options() };
        script("echo 'credentials not found in native keychain'; exit 1");
        let error = pull(&store, &reference, &refresh).unwrap_err();
        assert!(error.contains("wants a login"), "{error}");
        script("echo broken; exit 1");
        let error = pull(&store, &reference, &refresh).unwrap_err();
        assert!(error.contains("docker-credential-puter-test failed"), "{error}");
        script(&format!(
            r#"[ "$server" = "{address}" ] || exit 8
            echo '{{"ServerURL":"x","Username":"{USER}","Secret":"{PASSWORD}"}}'"#
        ));
        check_disk(&pull(&store, &reference, &refresh).unwrap());
    });
    drop(keep);
}

#[test]
#[ignore = "needs root"]
fn a_registry_with_tls_must_have_a_certificate_that_is_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let (key, certificate) = (directory.path().join("key.pem"), directory.path().join("cert.pem"));
    let variables = [("SSL_CERT_FILE", certificate.display().to_string())];
    let mut keep = None;
    let mut address = String::new();
    let start = || {
        let (key, certificate) = (key.to_str().unwrap(), certificate.to_str().unwrap());
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-keyout", key, "-out", certificate])
            .output()
            .expect("openssl must be installed");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let tls = format!("http: {{tls: {{certificate: {certificate}, key: {key}}}}}");
        let registry = Registry::start(directory.path(), &tls);
        let mut layout = Layout::new(&directory.path().join("layout"));
        layout.add(ARCHITECTURE, &layers());
        registry.push(&layout.finish("v"), "app:1", &["--override-arch", ARCHITECTURE]);
        let arguments = vec![directory.path().display().to_string(), registry.address.clone()];
        address = registry.address.clone();
        keep = Some(registry);
        arguments
    };
    in_a_child("real::a_registry_with_tls_must_have_a_certificate_that_is_trusted", &variables, start, |arguments| {
        let [directory, address] = arguments else { panic!("{arguments:?}") };
        check_disk(&pull(&Path::new(directory).join("store"), &format!("{address}/app:1"), &options()).unwrap());
    });
    if keep.is_some() {
        // Without the variable nobody vouches for the certificate.
        let error = pull(&directory.path().join("other"), &format!("{address}/app:1"), &options()).unwrap_err();
        assert!(
            error.contains("is not accepted") && error.contains("SSL_CERT_FILE") && error.contains("registry_ca"),
            "{error}"
        );
        assert_eq!(files(&directory.path().join("other")), [""; 0]);
    }
    drop(keep);
}

#[test]
#[ignore = "needs root"]
fn a_killed_pull_leaves_nothing_that_the_next_does_not_clean() {
    let directory = tempfile::tempdir().unwrap();
    let layout_path = directory.path().join("layout");
    let mut layout = Layout::new(&layout_path);
    let big: Vec<_> = (0..60).map(|n| entry(&format!("f{n}"), b'0', 0o644, "", &noise(4 << 20))).collect();
    layout.add(ARCHITECTURE, &[tar(&big), layers().remove(0), layers().remove(1), layers().remove(2)]);
    let reference = layout.finish("v");
    let store = directory.path().join("store");
    if let Ok(arguments) = std::env::var("PUTER_TEST_VICTIM") {
        let (store, reference) = arguments.split_once('\n').unwrap();
        pull(Path::new(store), reference, &options()).unwrap();
        return;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "registry::real::a_killed_pull_leaves_nothing_that_the_next_does_not_clean",
            "--include-ignored",
        ])
        .env("PUTER_TEST_VICTIM", format!("{}\n{reference}", store.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let under_way = || {
        let tmp = std::fs::read_dir(store.join("tmp")).into_iter().flatten().flatten();
        tmp.filter_map(|entry| std::fs::metadata(entry.path().join("disk.raw")).ok()).any(|data| data.len() > 0)
    };
    while !under_way() {
        assert!(victim.try_wait().unwrap().is_none(), "the pull ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert_ne!(files(&store), [""; 0]);
    Store::open(&store).unwrap();
    assert_eq!(files(&store), [""; 0]);
    check_disk(&pull(&store, &reference, &options()).unwrap());
}

#[test]
#[ignore = "needs root"]
fn damaged_copies_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let layout_path = directory.path().join("layout");
    let mut layout = Layout::new(&layout_path);
    let mut layers = layers();
    layers[1] = gzip(&layers[1]);
    layout.add(ARCHITECTURE, &layers);
    let store = directory.path().join("store");
    let error = pull(&store, &layout.finish("v"), &options()).unwrap_err();
    assert!(error.contains("layer 2 is not what the image says"), "{error}");
    let error = pull(&store, &format!("oci:{}:w", layout_path.display()), &options()).unwrap_err();
    assert!(error.contains("has no image 'w'; it has: v"), "{error}");
    let blob = layout_path.join("blobs/sha256").join(Digest::of(&layers[0]).hex());
    let bytes = std::fs::read(&blob).unwrap();
    std::fs::write(&blob, &bytes[..bytes.len() / 2]).unwrap();
    let error = pull(&store, &layout.finish("v"), &options()).unwrap_err();
    assert!(error.contains("the copy is not whole"), "{error}");
    let error = pull(&store, &format!("oci:{}", directory.path().display()), &options()).unwrap_err();
    assert!(error.contains("is no OCI image layout"), "{error}");
    let error = pull(&store, "docker-archive:/dev/null/x", &options()).unwrap_err();
    assert!(error.contains("cannot open /dev/null/x"), "{error}");
    assert_eq!(files(&store), [""; 0]);
}
