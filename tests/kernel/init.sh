#!/bin/busybox sh
# First process of the guest. It stays in the initial root, where the kernel finds /sbin/modprobe and its modules, and
# runs the guest's agent in the host's file system: read-only, under a layer in memory. What it says on the console:
#   RETINUE-KERNEL failed: WHY | RETINUE-KERNEL end STATUS   (the agent itself says "RETINUE-KERNEL ready VERSION")
export PATH=/bin:/sbin
/bin/busybox --install -s /bin

finish() {
  echo "RETINUE-KERNEL $*"
  sync
  poweroff -f
  sleep 60
}
need() { "$@" || finish "failed: $*"; }

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
# Our parameters come as shell assignments, in base64 for the sake of spaces.
sed -n 's/.*retinue=\([^ ]*\).*/\1/p' /proc/cmdline | base64 -d >/parameters
. /parameters
(sleep "$LIMIT" && finish "failed: still running after $LIMIT s") &

for module in virtio_pci virtio_net 9pnet_virtio 9p overlay tun; do
  need modprobe "$module"
done
need mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=524288,ro host /lower
need mount -t tmpfs -o size=300m layer /upper
mkdir /upper/data /upper/work
need mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
ln -s /proc/self/fd /root/dev/fd
for number in 0:stdin 1:stdout 2:stderr; do
  ln -s "/proc/self/fd/${number%:*}" "/root/dev/${number#*:}"
done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts pts /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t tmpfs -o mode=755 run /root/run
mount -t cgroup2 cgroup /root/sys/fs/cgroup

ip link set lo up
# Kernels before 6.13 look up the name of a new pair here first: tests name theirs eth0.
need ip link set eth0 name host0
need ip address add "$ADDRESS4" dev host0
echo 0 >/proc/sys/net/ipv6/conf/host0/accept_dad
need ip -6 address add "$ADDRESS6" dev host0
need ip link set host0 up
hostname guest
export PATH="$GUEST_PATH" HOME=/root PYTHONDONTWRITEBYTECODE=1
chroot /root "$PYTHON" -I -S "$AGENT" "${ADDRESS4%/*}"
status=$?
export PATH=/bin:/sbin
finish "end $status"
