#!/bin/sh
# job.sh JOB DIRECTORY COMMAND...: runs one job in a clone of its own, and exits as the command does.
#
# The directory is in the clone as /work, where the command runs; /work/out comes back when it has ended. The clone goes in
# any case: when the command has ended or failed, when its time is over, when this script is interrupted. Should the script
# be killed, sweep.sh finds what it left.
set -eu
job=$1 directory=$2
shift 2
base=${CI_BASE:-ci-base@ready}
limit=${CI_TIMEOUT:-3600}
locks=${CI_LOCKS:-$HOME/.cache/puter-ci}
vm=ci-$job

# Who holds the lock owns the clone. It is let go with this script, however that ends; so no program that is started here
# may have it, as those of puter live on as long as the clone does.
mkdir -p "$locks"
exec 9>>"$locks/$vm"
if ! flock --nonblock 9 || ! [ /dev/fd/9 -ef "$locks/$vm" ]; then
    echo "job.sh: $vm: this job runs already" >&2
    exit 1
fi

# It is no failure where there is none.
remove() {
    said=$(puter delete --force --snapshots "$vm" 2>&1 9>&-) && return
    case $said in
    *"there is no VM named"*) ;;
    *)
        echo "$said" >&2
        return 1
        ;;
    esac
}

clean_up() {
    status=$?
    trap '' HUP INT TERM
    remove && rm -f "$locks/$vm"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# What a killed job of this name left.
remove
# Jobs do not reach one another.
puter clone --isolate "$base" "$vm" >&2 9>&-
puter cp --quiet "$directory/." "$vm:/work" 9>&-

# In the background, as the shell hears signals only while it waits.
timeout "$limit" puter exec --directory /work "$vm" -- "$@" 9>&- &
status=0
wait "$!" || status=$?

if puter exec "$vm" -- sh -c 'test -e /work/out' 9>&-; then
    puter cp --quiet "$vm:/work/out" "$directory" 9>&-
fi
exit "$status"
