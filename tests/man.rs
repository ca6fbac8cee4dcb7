//! The manual pages and the executable: each command, option, setting and key is described in one place as it is, and
//! nothing that is not there.
//!
//! The pages are read line by line and strictly. A command is a `.Ss` of the section COMMANDS, an option is a `.It Fl`
//! below it and an `.Op Fl` of the SYNOPSIS, each on a line of its own, and has an `Ar` where it takes a value.

#[path = "man/page.rs"]
mod page;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use page::{directory, pages, parts, section};

/// Options by each of their names, with whether a value follows.
type Options = BTreeMap<String, bool>;

/// A directory with the executable's names.
fn names() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["puter", "puterd", "puter-agent"] {
        symlink(env!("CARGO_BIN_EXE_puter-multi"), dir.path().join(name)).unwrap();
    }
    dir
}

fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new(dir.join(program));
    command.args(args).env_clear().env("HOME", dir).current_dir(dir).output().unwrap()
}

fn help(dir: &Path, program: &str, words: &[&str]) -> String {
    let output = run(dir, program, &[words, &["--help"]].concat());
    assert!(output.status.success(), "{program} {words:?} --help: {}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The entries below this heading of a help.
fn listed<'a>(help: &'a str, heading: &str) -> Vec<&'a str> {
    let below = help.lines().skip_while(|line| *line != heading).skip(1).take_while(|line| !line.is_empty());
    // What begins further in goes on with the entry before.
    below.filter(|line| line.starts_with("  ") && !line.starts_with("   ")).collect()
}

/// The options that a help lists. The usage, on its first line, tells which of them take a value.
fn options(help: &str) -> Options {
    let usage = help.lines().next().unwrap_or_default();
    let mut all = Options::new();
    for entry in listed(help, "Options:") {
        let words = entry.split_whitespace().map(|word| word.trim_end_matches(','));
        let names: Vec<&str> = words.take_while(|word| word.starts_with('-')).collect();
        let value = names.iter().any(|name| usage.contains(&format!("[{name} <")));
        all.extend(names.iter().filter(|name| **name != "--help").map(|name| (name.to_string(), value)));
    }
    all
}

/// Adds the command of these words, or those below it.
fn add_commands(dir: &Path, words: &[&str], all: &mut BTreeMap<String, Options>) {
    let help = help(dir, "puter", words);
    let below = listed(&help, "Commands:");
    for entry in &below {
        let word = entry.split_whitespace().next().unwrap_or_default();
        add_commands(dir, &[words, &[word]].concat(), all);
    }
    if below.is_empty() {
        all.insert(words.join(" "), options(&help));
    }
}

/// Every command of `puter` with its options.
fn commands(dir: &Path) -> BTreeMap<String, Options> {
    let mut all = BTreeMap::new();
    add_commands(dir, &[], &mut all);
    // A word after `snapshot` is a name but for this one, so that the lists do not have it.
    add_commands(dir, &["snapshot", "delete"], &mut all);
    add_commands(dir, &["cluster", "snapshot", "delete"], &mut all);
    assert!(all.len() > 40, "the help lists commands: {:?}", all.keys());
    all
}

/// The options that a line of mdoc(7) names: the words after `Fl`, up to another macro.
fn named(line: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut follows = false;
    for word in line.strip_prefix('.').unwrap_or_default().split_whitespace() {
        let is_macro = word.len() == 2 && word.starts_with(|c: char| c.is_ascii_uppercase());
        if is_macro {
            follows = word == "Fl";
        } else if follows && !word.chars().all(|c| c.is_ascii_punctuation()) {
            names.push(format!("-{word}"));
        }
    }
    names
}

/// The options of the lines that begin so.
fn described(lines: &[&str], begin: &str) -> Options {
    let mut all = Options::new();
    for line in lines.iter().filter(|line| line.starts_with(begin)) {
        let value = line.split_whitespace().any(|word| word == "Ar");
        for name in named(line) {
            assert!(all.insert(name, value).is_none(), "a second time: {line}");
        }
    }
    all
}

/// Checks that each option stands in the synopsis and has an entry, and that no other is named.
fn compare(what: &str, there: &Options, synopsis: &[&str], text: &[&str]) {
    assert_eq!(&described(text, ".It Fl "), there, "entries (left) and options (right) of {what}");
    assert_eq!(&described(synopsis, ".Op Fl "), there, "synopsis (left) and options (right) of {what}");
    for line in synopsis.iter().chain(text) {
        for name in named(line) {
            assert!(there.contains_key(&name), "{what} has no option {name}: {line}");
        }
    }
}

/// Where each command is described.
fn places(pages: &BTreeMap<String, String>, there: &BTreeMap<String, Options>) -> BTreeMap<String, String> {
    let mut places = BTreeMap::new();
    for (name, page) in pages.iter().filter(|(name, _)| name.ends_with(".1") && *name != "puter.1") {
        let synopsis = section(page, "SYNOPSIS");
        let mut forms: BTreeMap<_, _> = parts(&synopsis, ".Nm").into_iter().collect();
        for (title, text) in parts(&section(page, "COMMANDS"), ".Ss") {
            let command = title.strip_prefix("puter ").unwrap_or_else(|| panic!("{name}: {title}"));
            let options = there.get(command).unwrap_or_else(|| panic!("{name}: there is no command '{command}'"));
            let form = forms.remove(title).unwrap_or_else(|| panic!("{name}: no synopsis of '{title}'"));
            compare(&format!("'{title}' in {name}"), options, &form, &text);
            let former = places.insert(command.to_string(), name.clone());
            assert_eq!(former, None, "'{command}' is described in {name} as well");
        }
        assert!(forms.is_empty(), "{name}: no description of {:?}", forms.keys());
    }
    places
}

#[test]
fn each_command_is_described_once_with_its_options() {
    let dir = names();
    let (pages, there) = (pages(), commands(dir.path()));
    let places = places(&pages, &there);
    let missing: Vec<_> = there.keys().filter(|command| !places.contains_key(*command)).collect();
    assert!(missing.is_empty(), "no page describes {missing:?}");

    let overview = section(&pages["puter.1"], "COMMANDS");
    let rows: Vec<&str> = overview.iter().filter_map(|line| line.strip_prefix(".It Ic ")).collect();
    let entry = |row: &&str| {
        let cells: Vec<&str> = row.split(" Ta ").collect();
        let [command, page, _] = cells.as_slice() else { panic!("not three cells: {row}") };
        let page = page.strip_prefix("Xr ").unwrap_or_else(|| panic!("no page: {row}"));
        (command.to_string(), page.replace(' ', "."))
    };
    let table: BTreeMap<String, String> = rows.iter().map(entry).collect();
    assert_eq!(table, places, "the table of puter.1 (left) and where commands are described (right)");
    assert_eq!(rows.len(), table.len(), "a command is in the table of puter.1 twice");

    let mut known: BTreeSet<&str> = there.values().flat_map(|options| options.keys().map(String::as_str)).collect();
    known.extend(["--help", "--version", "-V"]);
    for (name, page) in pages.iter().filter(|(name, _)| name.ends_with(".1")) {
        for option in page.lines().flat_map(named) {
            assert!(known.contains(option.as_str()), "{name}: no command has the option {option}");
        }
    }
}

#[test]
fn each_option_of_the_daemons_is_described() {
    let dir = names();
    let pages = pages();
    for program in ["puterd", "puter-agent"] {
        let page = &pages[&format!("{program}.8")];
        let there = options(&help(dir.path(), program, &[]));
        assert!(there.len() >= 3, "{program} has options: {there:?}");
        let lines: Vec<&str> = page.lines().collect();
        compare(program, &there, &section(page, "SYNOPSIS"), &lines);
    }
}

#[test]
fn each_setting_is_described_with_its_default() {
    let dir = names();
    let output = run(dir.path(), "puter", &["config", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let settings = shown["settings"].as_array().unwrap();
    let pages = pages();
    let text = section(&pages["puter.toml.5"], "SETTINGS");
    let entries = parts(&text, ".It Va");
    let described: Vec<&str> = entries.iter().map(|(name, _)| *name).collect();
    let there: Vec<&str> = settings.iter().map(|setting| setting["name"].as_str().unwrap()).collect();
    assert_eq!(described, there, "the page (left) and `puter config` (right)");
    for ((name, lines), setting) in entries.iter().zip(settings) {
        let default = match setting["value"].as_str().unwrap() {
            "" => "No default; environment".to_string(),
            value => format!("Default\n.Ql {value} ;\nenvironment"),
        };
        let wanted = format!("{default}\n.Ev PUTER_{} .", name.to_ascii_uppercase());
        assert!(lines.join("\n").contains(&wanted), "{name} is to have:\n{wanted}");
    }
}

#[test]
fn each_key_of_a_clusters_file_is_described() {
    let dir = names();
    let pages = pages();
    for (title, text) in [("KEYS", "no-such = 1\n"), ("KEYS OF A ROLE", "[roles.web]\nno-such = 1\n")] {
        std::fs::write(dir.path().join("cluster.toml"), text).unwrap();
        let output = run(dir.path(), "puter", &["cluster", "create", "--file", "cluster.toml"]);
        let said = String::from_utf8(output.stderr).unwrap();
        let (_, list) = said.split_once("expected one of ").unwrap_or_else(|| panic!("{said}"));
        let there: Vec<&str> = list.lines().next().unwrap_or_default().split('`').skip(1).step_by(2).collect();
        let page = section(&pages["puter-cluster.toml.5"], title);
        let described: Vec<&str> = parts(&page, ".It Va").iter().map(|(name, _)| *name).collect();
        assert_eq!(described, there, "{title}: the page (left) and what is read (right)");
    }
}

#[test]
fn pages_lead_to_pages_that_are_there() {
    let pages = pages();
    let mut from_overview = BTreeSet::from(["puter.1".to_string()]);
    for (name, page) in &pages {
        let (title, number) = name.rsplit_once('.').unwrap();
        assert_eq!(page.lines().nth(1), Some(format!(".Dt {} {number}", title.to_uppercase()).as_str()), "{name}");
        for line in page.lines().filter(|line| line.starts_with('.')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            for three in words.windows(3).filter(|three| three[0].trim_start_matches('.') == "Xr") {
                let other = format!("{}.{}", three[1], three[2]);
                let own = three[1].starts_with("puter");
                assert!(!own || pages.contains_key(&other), "{name} leads to {other}, which there is not");
                if name == "puter.1" {
                    from_overview.insert(other);
                }
            }
        }
    }
    let lost: Vec<_> = pages.keys().filter(|name| !from_overview.contains(*name)).collect();
    assert!(lost.is_empty(), "puter.1 does not lead to {lost:?}");
}

/// All of the product's source, with strings that go over several lines in one.
fn source(directory: &Path) -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            all.push_str(&source(&entry));
        } else if entry.extension().is_some_and(|end| end == "rs") {
            let text = std::fs::read_to_string(&entry).unwrap();
            let mut pieces = text.split("\\\n");
            all.push_str(pieces.next().unwrap_or_default());
            all.extend(pieces.map(str::trim_start));
        }
    }
    all
}

#[test]
fn symptoms_are_in_the_words_of_the_code() {
    let page = &pages()["puter-troubleshooting.7"];
    let code = source(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let mut symptoms = 0;
    for symptom in page.lines().filter_map(|line| line.strip_prefix(".It Li ")) {
        symptoms += 1;
        for words in symptom.split("...").map(str::trim).filter(|words| words.len() > 2) {
            assert!(code.contains(words), "no message has '{words}': {symptom}");
        }
    }
    assert!(symptoms > 30, "{symptoms}");
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let examples = ["packaging/examples/ci/README.md", "packaging/examples/etcd/README.md"];
    for name in
        ["README.md", "ARCHITECTURE.md", "packaging/README.md", "packaging/guest/README.md"].iter().chain(&examples)
    {
        let document = top.join(name);
        let text = std::fs::read_to_string(&document).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let there = target.contains("://") || document.with_file_name(target).exists();
            assert!(there, "{name} leads to {target}, which there is not");
        }
    }
}

#[test]
#[ignore = "needs Debian packages"]
fn mandoc_finds_nothing_wrong() {
    for name in pages().keys() {
        let mut command = Command::new("mandoc");
        let output = command.args(["-T", "lint", "-W", "warning"]).arg(directory().join(name)).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success() && said.is_empty(), "{name}: {}", String::from_utf8_lossy(&said));
    }
}
