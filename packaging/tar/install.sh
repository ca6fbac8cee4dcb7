#!/bin/sh
# Installs puter below a prefix: install.sh [--prefix DIR]   (default: /usr/local)
set -eu

usage() {
    echo "usage: install.sh [--prefix DIR]" >&2
    exit 2
}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

prefix=/usr/local
while [ $# -gt 0 ]; do
    case "$1" in
    --prefix) [ $# -ge 2 ] || usage; prefix=$2; shift 2 ;;
    --prefix=*) prefix=${1#--prefix=}; shift ;;
    *) usage ;;
    esac
done
case "$prefix" in
/*) ;;
*) fail "the prefix '$prefix' is not an absolute path" ;;
esac
[ "$(id -u)" = 0 ] || fail "only root can give puterd its capabilities: run it with sudo"
command -v setcap >/dev/null || fail "setcap is missing: install libcap's programs (Debian: libcap2-bin, others: libcap)"
cd "$(dirname "$0")"

if ! grep -q '^puter:' /etc/group; then
    if command -v groupadd >/dev/null; then
        groupadd --system puter
    else
        addgroup -S puter
    fi
fi

# Beside its place first, so that a puterd that runs keeps its old file. The group comes before the mode, and the
# capabilities last: there is no moment at which others may run the file with them.
lib=$prefix/lib/puter
mkdir -p "$lib" "$prefix/bin"
new=$lib/.puter-multi.new
rm -f "$new"
(umask 077 && cp puter-multi "$new")
chown root:puter "$new"
chmod 0750 "$new"
setcap cap_net_admin,cap_net_raw,cap_net_bind_service=ep "$new" || { rm -f "$new"; fail "$lib cannot hold capabilities"; }
mv -f "$new" "$lib/puter-multi"
for name in puter puterd; do
    ln -sf ../lib/puter/puter-multi "$prefix/bin/$name"
done

share=$prefix/share
put() {
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2"
    chmod 0644 "$2"
}
for page in man/man*/*.gz; do
    put "$page" "$share/$page"
done
put completions/bash "$share/bash-completion/completions/puter"
put completions/zsh "$share/zsh/site-functions/_puter"
put completions/fish "$share/fish/vendor_completions.d/puter.fish"
for file in README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE third-party-licences.gz puter.cdx.json; do
    put "$file" "$share/doc/puter/$file"
done

# Where systemd looks for what is not a package's.
case "$prefix" in
/usr|/usr/local)
    units=$prefix/lib/systemd/system
    mkdir -p "$units"
    for unit in puterd@.service puterd@.socket; do
        sed "s|/usr/bin/puterd|$prefix/bin/puterd|" "systemd/$unit" >"$units/$unit"
        chmod 0644 "$units/$unit"
    done
    [ ! -d /run/systemd/system ] || systemctl daemon-reload || true
    ;;
esac

if [ -d /etc/udev/rules.d ]; then
    put 60-puter.rules /etc/udev/rules.d/60-puter.rules
    if [ -S /run/udev/control ]; then
        udevadm control --reload || true
        udevadm trigger --subsystem-match=misc --sysname-match=userfaultfd || true
    fi
fi

echo "puter is in $prefix/bin. Members of the group puter may run it: usermod -aG puter USER, then log in again."
