#!/bin/sh
# Turns a fresh Debian tree into the guest's base. $1: the tree. Run by mmdebstrap as its customize hook.
set -eu
root=$1
here=$(dirname "$0")

cp -r "$here/tree/." "$root/"
printf '%s\n' virtio_pci virtio_blk ext4 >>"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u

# Nothing that tells one machine from another: the agent gives each its own.
rm -f "$root"/etc/ssh/ssh_host_* "$root/var/lib/dbus/machine-id" "$root/var/lib/systemd/random-seed"
: >"$root/etc/machine-id"
echo puter >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# The network begins when the agent has written its configuration; no unit waits for it, no timer wakes an idle machine.
chroot "$root" systemctl enable systemd-networkd.service systemd-resolved.service
chroot "$root" systemctl mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer e2scrub_reap.service getty@tty1.service
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt
