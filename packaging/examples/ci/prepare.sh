#!/bin/sh
# prepare.sh IMAGE SCRIPT SNAPSHOT: the machine that jobs are clones of. SCRIPT runs in it once, as root, and installs what
# jobs need; then its memory and disk are kept as ci-base@SNAPSHOT.
set -eu
image=$1 script=$2 snapshot=$3

puter start --image "$image" ci-base
puter cp --quiet "$script" ci-base:/root/prepare
puter exec ci-base -- sh /root/prepare
puter snapshot --name "$snapshot" ci-base
# The snapshot is all that clones need.
puter stop ci-base
