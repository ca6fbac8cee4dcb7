#!/bin/sh
# Run once in each member, at its first boot: installs etcd where it is not there yet, and forms the cluster.
set -eu

if ! command -v etcd >/dev/null || ! command -v etcdctl >/dev/null; then
    # Debian starts what it installs, and this etcd would begin as a cluster of one.
    systemctl --quiet mask etcd.service
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install etcd-server etcd-client
fi

# Members know one another by name. Names lead to the members of a clone in that clone, addresses would not.
for member in $PUTER_MEMBERS; do
    cluster=${cluster:+$cluster,}$member=http://$member:2380
done
cat >/etc/default/etcd <<END
ETCD_NAME=$PUTER_MEMBER
ETCD_DATA_DIR=/var/lib/etcd/default
ETCD_INITIAL_CLUSTER=$cluster
ETCD_INITIAL_CLUSTER_TOKEN=$PUTER_CLUSTER
ETCD_INITIAL_ADVERTISE_PEER_URLS=http://$PUTER_MEMBER:2380
ETCD_ADVERTISE_CLIENT_URLS=http://$PUTER_MEMBER:2379
ETCD_LISTEN_PEER_URLS=http://0.0.0.0:2380
ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379
# For machines that share a host, which at times hold one another up for longer than those of a data centre do.
ETCD_HEARTBEAT_INTERVAL=500
ETCD_ELECTION_TIMEOUT=5000
END

# It is up when a majority is: the members wait for one another here, for longer than systemd would by itself.
mkdir -p /etc/systemd/system/etcd.service.d
printf '[Service]\nTimeoutStartSec=15min\n' >/etc/systemd/system/etcd.service.d/puter.conf
systemctl --quiet unmask etcd.service
systemctl daemon-reload
systemctl --quiet enable etcd.service
systemctl restart etcd.service
