#!/bin/sh
# SPDX-License-Identifier: AGPL-3.0-or-later
# The whole user space of the test guest: loads the disk drivers, says that it is up, then runs each line that arrives
# on the serial console as a shell command and ends its output with "replctl-guest: exit STATUS". Mounts no disk itself.
export PATH=/bin

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
# The order matters: each of these needs the ones before it.
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    insmod /modules/$module.ko || echo "replctl-guest: $module did not load"
done
# What the host writes must not come back mixed with answers; a reader of the log sees only these.
stty -echo -onlcr </dev/console

# write_blocks DEVICE FIRST COUNT WORD: COUNT blocks of 64 KiB from block FIRST, filled with WORD, durable on return.
write_blocks() {
    yes "$4" | dd of="$1" bs=64k seek="$2" count="$3" iflag=fullblock conv=notrunc,fsync 2>/dev/null
}

# write_files FOLDER COUNT WORD: COUNT small files that hold WORD and their number, durable on return.
write_files() {
    mkdir -p "$1" || return
    number=0
    while [ "$number" -lt "$2" ]; do
        echo "$3 $number" >"$1/file-$number" || return
        number=$((number + 1))
    done
    sync
}

# checksum PATH: SHA-256 of a file or a whole disk, in hexadecimal.
checksum() {
    sum=$(sha256sum "$1") && echo "${sum%% *}"
}

# checksum_tree FOLDER: one SHA-256 over names and contents of all files in it.
checksum_tree() {
    sum=$(cd "$1" && find . -type f | sort | xargs sha256sum | sha256sum) && echo "${sum%% *}"
}

echo "replctl-guest: ready"
while read -r line; do
    eval "$line"
    echo "replctl-guest: exit $?"
done
# The host has closed the line.
poweroff -f
