#!/bin/sh
# sweep.sh: removes the clones of jobs that are no more. It is safe at any time, also while jobs run.
set -eu
locks=${CI_LOCKS:-$HOME/.cache/puter-ci}

for lock in "$locks"/ci-*; do
    [ -e "$lock" ] || continue
    vm=${lock##*/}
    (
        # Held: its job lives.
        flock --nonblock 9 || exit 0
        if said=$(puter delete --force --snapshots "$vm" 2>&1 9>&-); then
            echo "$vm was left behind, and is gone"
        else
            case $said in
            *"there is no VM named"*) ;;
            *)
                # Its lock stays, so that the next one tries again.
                echo "$said" >&2
                exit 1
                ;;
            esac
        fi
        rm -f "$lock"
    ) 9>>"$lock"
done
