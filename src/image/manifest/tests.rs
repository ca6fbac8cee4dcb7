//! Documents of every kind.

use super::*;

const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

fn fails(result: Result<impl std::fmt::Debug>, reason: &str) {
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains(reason), "{error}");
}

fn index() -> String {
    format!(
        r#"{{"schemaVersion":2,"manifests":[
        {{"digest":"{B}","size":5,"platform":{{"os":"linux","architecture":"arm64","variant":"v8"}}}},
        {{"digest":"{B}","size":5,"platform":{{"os":"unknown","architecture":"unknown"}},
          "annotations":{{"vnd.docker.reference.type":"attestation-manifest"}}}},
        {{"digest":"{B}","size":5,"platform":{{"os":"windows","architecture":"amd64"}}}},
        {{"digest":"{A}","size":5,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
    )
}

#[test]
fn the_manifest_of_the_platform_is_chosen_from_an_index() {
    let Document::Index(chosen) = parse(index().as_bytes(), "", "amd64").unwrap() else { panic!() };
    assert_eq!(chosen.digest.to_string(), A);
    let Document::Index(chosen) = parse(index().as_bytes(), "", "arm64").unwrap() else { panic!() };
    assert_eq!(chosen.digest.to_string(), B);
    fails(
        parse(index().as_bytes(), "", "riscv64"),
        "not made for linux/riscv64; it offers linux/amd64, linux/arm64/v8, windows/amd64",
    );
}

#[test]
fn documents_that_are_no_image_are_explained() {
    fails(parse(b"<!DOCTYPE html><p>Log in", "text/html", "amd64"), "a web page came instead of a manifest");
    fails(parse(b"\0\xff", "", "amd64"), "what came is not a manifest");
    fails(parse(b"{}", "a/b", "amd64"), "neither an image manifest nor an image index (media type 'a/b')");
    fails(parse(br#"{"schemaVersion":1,"fsLayers":[]}"#, "", "amd64"), "schema 1");
    fails(parse(br#"{"manifests":[]}"#, "", "amd64"), "it offers nothing");
    let helm = format!(
        r#"{{"config":{{"digest":"{A}","size":2,"mediaType":"application/vnd.cncf.helm.config.v1+json"}},"layers":[]}}"#
    );
    fails(parse(helm.as_bytes(), "", "amd64"), "no image but a Helm chart (configuration type 'application/vnd.cncf");
    fails(parse(helm.replace("cncf.helm", "x").as_bytes(), "", "amd64"), "no image but an artifact");
    let negative = format!(r#"{{"config":{{"digest":"{A}","size":-2}},"layers":[]}}"#);
    fails(parse(negative.as_bytes(), "", "amd64"), "negative size");
    fails(parse(br#"{"config":{"digest":"sha256:..","size":2},"layers":[]}"#, "", "amd64"), "bad digest");
    let layer = format!(r#"{{"digest":"{A}","size":1}},"#).repeat(600);
    let many = format!(r#"{{"config":{{"digest":"{A}","size":2}},"layers":[{}]}}"#, layer.trim_end_matches(','));
    fails(parse(many.as_bytes(), "", "amd64"), "600 layers");
}

#[test]
fn layers_that_are_no_archive_are_refused_with_the_reason() {
    let with = |kind: &str| {
        format!(
            r#"{{"config":{{"digest":"{A}","size":2}},"layers":[{{"digest":"{B}","size":1}},
            {{"digest":"{A}","size":1,"mediaType":"{kind}","urls":["https://go.example/layer\u001b[2J"]}}]}}"#
        )
    };
    let (oci, docker) = ("application/vnd.oci.image.layer", "application/vnd.docker.image.rootfs");
    for kind in ["v1.tar", "v1.tar+gzip", "v1.tar+zstd"] {
        assert!(parse(with(&format!("{oci}.{kind}")).as_bytes(), "", "amd64").is_ok(), "{kind}");
    }
    for kind in ["diff.tar", "diff.tar.gzip", "diff.tar.zstd"] {
        assert!(parse(with(&format!("{docker}.{kind}")).as_bytes(), "", "amd64").is_ok(), "{kind}");
    }
    for (kind, reason) in [
        (format!("{docker}.foreign.diff.tar.gzip"), "layer 2: it is not in the registry but at"),
        (format!("{oci}.nondistributable.v1.tar+gzip"), "(https://go.example/layer\u{fffd}[2J)"),
        (format!("{oci}.v1.tar+gzip+encrypted"), "layer 2: it is encrypted"),
        (format!("{oci}.v1.tar+lz4"), "in a way that puter does not know ('lz4')"),
        ("application/vnd.in-toto+json".into(), "no files of a machine but 'application/vnd.in-toto+json'"),
    ] {
        fails(parse(with(&kind).as_bytes(), "", "amd64"), reason);
    }
}

#[test]
fn errors_are_short_and_deep_documents_no_danger() {
    let long = "\\u001b".repeat(1 << 19);
    for text in [
        format!(r#"{{"schemaVersion":"{long}"}}"#),
        format!(r#"{{"mediaType":"{long}"}}"#),
        format!(r#"{{"manifests":[{{"digest":"{long}","size":1}}]}}"#),
        format!(r#"{{"manifests":[{{"digest":"{A}","size":1,"platform":{{"os":"{long}","architecture":"x"}}}}]}}"#),
        format!(r#"{{"config":{{"digest":"{A}","size":1,"mediaType":"{long}"}},"layers":[]}}"#),
        format!(
            r#"{{"config":{{"digest":"{A}","size":1}},"layers":[{{"digest":"{A}","size":1,"mediaType":"{long}"}}]}}"#
        ),
        format!("[{}", "[".repeat(1 << 20)),
        format!(r#"{{"manifests":{}"#, "[".repeat(1 << 20)),
    ] {
        for result in
            [parse(text.as_bytes(), "", "amd64").map(drop), parse_config(text.as_bytes(), 1, "amd64").map(drop)]
        {
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.chars().count() < 700 && !error.contains('\u{1b}'), "{}", error.len());
        }
    }
    let unknown = format!(r#"{{"x":{}1{},"manifests":[]}}"#, "[".repeat(1 << 20), "]".repeat(1 << 20));
    fails(parse(unknown.as_bytes(), "", "amd64"), "it offers nothing");
}

#[test]
fn a_configuration_must_fit_its_manifest_and_the_machine() {
    let config =
        |os: &str, arch: &str| format!(r#"{{"os":"{os}","architecture":"{arch}","rootfs":{{"diff_ids":["{A}"]}}}}"#);
    let good = parse_config(config("linux", "amd64").as_bytes(), 1, "amd64").unwrap();
    assert_eq!(good.diff_ids, [A.parse().unwrap()]);
    fails(parse_config(config("windows", "amd64").as_bytes(), 1, "amd64"), "made for windows");
    fails(parse_config(config("linux", "arm64").as_bytes(), 1, "amd64"), "it offers linux/arm64");
    fails(parse_config(config("linux", "amd64").as_bytes(), 2, "amd64"), "names 1 layers, its manifest 2");
    let many = vec![format!("\"{A}\""); 600].join(",");
    let many = format!(r#"{{"os":"linux","rootfs":{{"diff_ids":[{many}]}}}}"#);
    fails(parse_config(many.as_bytes(), 600, "amd64"), "600 layers");
    fails(parse_config(b"{}", 0, "amd64"), "not an image configuration");
    fails(parse_config(br#"{"rootfs":{"diff_ids":[]}}"#, 0, "amd64"), "no layers");
}

#[test]
fn an_image_of_a_layout_is_chosen_by_its_tag() {
    let entry = |digest: &str, name: &str| {
        format!(r#"{{"digest":"{digest}","size":1,"annotations":{{"org.opencontainers.image.ref.name":"{name}"}}}}"#)
    };
    let both = format!(r#"{{"manifests":[{},{}]}}"#, entry(A, "a"), entry(B, "b"));
    assert_eq!(choose_tag(both.as_bytes(), Some("b"), "amd64").unwrap().digest.to_string(), B);
    fails(choose_tag(both.as_bytes(), None, "amd64"), "several images (a, b)");
    fails(choose_tag(both.as_bytes(), Some("c"), "amd64"), "no image 'c'; it has: a, b");
    let one = format!(r#"{{"manifests":[{}]}}"#, entry(A, "a"));
    assert_eq!(choose_tag(one.as_bytes(), None, "amd64").unwrap().digest.to_string(), A);
    let latest = format!(r#"{{"manifests":[{},{}]}}"#, entry(A, "a"), entry(B, "latest"));
    assert_eq!(choose_tag(latest.as_bytes(), None, "amd64").unwrap().digest.to_string(), B);
    fails(choose_tag(br#"{"manifests":[]}"#, None, "amd64"), "holds no image");
    fails(choose_tag(b"[]", None, "amd64"), "no image index");
    assert_eq!(choose_tag(index().as_bytes(), None, "amd64").unwrap().digest.to_string(), A);
}
