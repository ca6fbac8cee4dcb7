//! puter's own ssh key and each VM's known_hosts.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::Hint;
use super::files::{self, write_atomic};
use super::home::Home;

/// The private key with which `puter ssh` logs in.
pub fn private(home: &Home) -> PathBuf {
    home.ssh().join("id_ed25519")
}

/// The public key, made together with the private one at the first call.
///
/// # Errors
/// When ssh-keygen is missing or fails.
pub fn public(home: &Home) -> Result<String> {
    let key = private(home);
    let public = key.with_extension("pub");
    let limit = std::time::Duration::from_secs(10);
    let _lock =
        files::lock(&home.ssh().join(".lock"), limit, "another command has been making the ssh key for 10 seconds")?;
    if !public.exists() || !key.exists() {
        let temporary = home.ssh().join(".new");
        files::remove(&temporary)?;
        files::remove(&temporary.with_extension("pub"))?;
        let output = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "puter", "-f"])
            .arg(&temporary)
            .stdin(Stdio::null())
            .output()
            .context("cannot run ssh-keygen")
            .hint("install OpenSSH's client (Debian: openssh-client)")?;
        ensure!(output.status.success(), "ssh-keygen failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        // The public key last: its presence says that the pair is whole.
        std::fs::rename(&temporary, &key)?;
        std::fs::rename(temporary.with_extension("pub"), &public)?;
    }
    let text = std::fs::read_to_string(&public).with_context(|| format!("cannot read {}", public.display()))?;
    Ok(text.trim().to_string())
}

/// Writes the VM's known_hosts from the keys its agent told over vsock, so that no first connection is a leap of faith.
///
/// # Errors
/// When the file cannot be written.
pub fn remember_host(home: &Home, vm: &str, host_keys: &[String]) -> Result<()> {
    write_atomic(&home.known_hosts(vm), known_hosts(vm, host_keys).as_bytes())
}

/// The VM's known_hosts: a line for each key that is one.
pub fn known_hosts(vm: &str, host_keys: &[String]) -> String {
    let mut text = String::new();
    for key in host_keys {
        // The lines come from the guest: take the type and the key, and nothing that could begin another line.
        let mut words = key.split_ascii_whitespace();
        if let (Some(kind), Some(blob)) = (words.next(), words.next())
            && key.len() < 4096
            && kind.bytes().all(|b| b.is_ascii_alphanumeric() || b"-@.".contains(&b))
            && blob.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
        {
            text.push_str(&format!("{vm} {kind} {blob}\n"));
        }
    }
    text
}

/// A VM's part of ssh_config(5), under these names: the options that `puter ssh` gives on its command line.
pub fn ssh_host(home: &Home, vm: &str, names: &str, ip: Ipv4Addr) -> String {
    format!(
        "Host {names}\n  HostName {ip}\n  User root\n  HostKeyAlias {vm}\n  IdentityFile \"{key}\"\n  IdentitiesOnly yes\n  \
         UserKnownHostsFile \"{hosts}\"\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  UpdateHostKeys no\n\n",
        key = private(home).display(),
        hosts = home.known_hosts(vm).display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_smuggle_lines_into_known_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let keys = ["ssh-ed25519 AAAA root@x\n* ssh-ed25519 EVIL".to_string(), "@cert-authority* A".into(), "x".into()];
        remember_host(&home, "web", &keys).unwrap();
        assert_eq!(std::fs::read_to_string(home.known_hosts("web")).unwrap(), "web ssh-ed25519 AAAA\n");
    }
}
