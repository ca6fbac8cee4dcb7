//! A directory for what a target writes: in the one for temporary files, which is in memory when `cargo xtask fuzz` runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The directory, empty.
pub fn empty() -> PathBuf {
    let path = std::env::temp_dir().join(format!("puter-fuzz-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).expect("a directory");
    path
}

/// Lets this user read everything below a directory again, whatever the modes are.
pub fn open_up(directory: &Path) {
    let metadata = fs::symlink_metadata(directory).expect("a file that is there");
    if !metadata.is_symlink() {
        fs::set_permissions(directory, fs::Permissions::from_mode(metadata.mode() & 0o777 | 0o700)).expect("a mode");
    }
    if metadata.is_dir() {
        fs::read_dir(directory).expect("a directory").for_each(|entry| open_up(&entry.expect("an entry").path()));
    }
}

/// Every file below a directory with its size, or where it leads; links are not followed.
pub fn listing(directory: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).expect("a file that is there");
        let contents = match metadata.is_file() {
            true => fs::read(&path).expect("a file that can be read"),
            false => fs::read_link(&path).map(|to| to.into_os_string().into_encoded_bytes()).unwrap_or_default(),
        };
        let size = if metadata.is_dir() { 0 } else { metadata.size() };
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).expect("a directory").map(|entry| entry.expect("an entry").path()));
        }
        all.insert(path, (metadata.mode(), size, contents));
    }
    all
}
