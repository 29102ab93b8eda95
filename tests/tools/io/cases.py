"""What is typed into both tools. The images: 4 MiB, 7s from 1 MiB to 2 MiB, else nothing."""

from __future__ import annotations

READING = r"""
read
read 0
read 0 512 512
read -Z 0 512
read -P
read abc 512
read 0 abc
read -1 512
read 0 -1
read -P 300 0 512
read -P abc 0 512
read -P 0x1ff 0 512
read -P 0x7 1M 512
read -P 07 1M 512
read -P 010 1M 512
read -P -1 0 512
read -P 300 -Z 0 512
read 0 1E
read 0 3G
read 0 2147483136
read 0 2147483137
read 1 511
read 0 1.5k
read 0 .5k
read 0 0
read -s 5 0 512
read -l 5 0 512
read -P 0 -s 5 0 512
read -P 0 -s 5 -l 600 0 512
read -P 0 -s 513 0 512
read -P 0 -s 512 0 512
read -P 1 -s 500 -l 12 0 512
read -P 1 -s 500 -l 10 0 512
read -P 5 -l 0 0 512
read -P 0 -s abc 0 512
read -P 0 -l 8E 0 512
read -P 1 -l 5 0 512
read -P 1 -s 5 0 512
read -a 0 512
read -p 0 512
read -r 0 512
read -q 0 512
read -C 0 512
read -Cv 0 16
read -v 0 40
read -v 5 3
read -v 1048570 40
read -v 4194300 4
read -v 4194300 5
read 4M 1
read 4M 0
read 8M 512
read 8M 0
read -P 7 1M 1M
read -P 7 1023k 64k
read -P 1 0 512
read -q -P 1 0 512
read -q -P 1 4M 512
read -C -P 1 0 512
read -v -P 1 0 16
read -vq -P 1 0 16
read   0     512
read "0" 512
read 010 512
read 0 64kB
read 0 +512
read 0 1e3
read 0 1.0
read 0 1.5
read 0 0x200
read 0 0x2k
read 0 0X200
read 1_0 512
read 0x1_0 512
readv
readv 0
readv 0 512
readv 0 512 512 1k
readv 0 0 512
readv 0 0 0
readv 0 513
readv 0 abc
readv 0 -- 5
readv 0 3G
readv 0 2G 2G
readv 0 1G 1G 1G
readv abc 1
readv -v 0 5 7
readv -v 5 5 7
readv -P 1 0 512 512
readv -P 7 1M 512 512
readv -P 300 0 512
readv -q 0 512
readv -C 0 512 512
readv -b 0 512
readv 8M 512
aio_read 0 512
aio_read 0 512 512
aio_read -v 0 7 7
aio_read -P 1 0 512
aio_read -i 0 512
aio_read -i 0 x
aio_read -z 0 512
aio_read -q 0 512
aio_read -C 0 512
aio_read 8M 512
aio_read 0 x
aio_read x 512
aio_read 0
aio_read -P 300 0 512
r 0 512
"""

WRITING = r"""
write 0 512
write 3 700
write -1 0 512
write -z 0 4k
write -z 1000 1000
write -z -P 1 0 4k
write -z -s nofile 0 4k
write -s nofile -P 1 0 4k
write -n 0 4k
write -u 0 4k
write -n -u 0 512
write -zn 0 4k
write -zu 1M 64k
write -zun 1M 64k
write -zf 0 4k
write -f 0 4k
write -c 0 64k
write -bc 0 4k
write -bz 0 4k
write -bz -P 1 0 4k
write -cz 0 4k
write -bf 0 4k
write -bf -n 0 4k
write -bn 0 4k
write -cu 0 4k
write -zc 0 1
write -b 3 3
write -c 3 3
write -c 512 64k
write -c 0 512
write -c 0 128k
write -s nofile 0 4k
write -s /dev/null 0 4k
write -s /tmp 0 4k
write -s pattern 0 4k
write -s pattern 5 1000
write -s pattern 0 0
write -rs pattern 0 512
write -p 0 4k
write -r 0 4k
write -rz 0 4k
write -q 0 4k
write -C 0 4k
write -v 0 4k
write 0 0
write -z 0 0
write -z 0 4G
write -z 0 4M
write -z 1 4M
write -z 0 1E
write -z 0 8E
write -zn 0 4G
write 4M 1
write 4194303 2
write 8M 512
write 8M 0
write -z 8M 0
write 0
write -P 300 0 512
write -P 300 0 x
write -P 0x7f 0 512
writev 0 512 512
writev -P 5 0 512 512
writev -f 0 512
writev -z 0 512
writev 8M 512 512
writev -C 0 512 512
writev -q 0 512
writev 0
writev
writev -Z 0 512
writev x 512
writev 0 x
writev 0 -1
aio_write 0 512
aio_write -z 0 512
aio_write -z 0 512 512
aio_write -z -P 1 0 512
aio_write -u 0 512
aio_write -zu 1M 64k
aio_write -f 0 512
aio_write -i 0 512
aio_write -C 0 512
aio_write -q 0 512
aio_write 8M 512
aio_write -z 8M 512
aio_write 0
aio_write 0 x
aio_write x 512
aio_write -z 0 x
aio_write -z 0 4G
aio_write -Z 0 x
aio_write -rz 0 512
aio_write -zr -u 0 512 512
aio_write -z 0 8E
aio_write -i -z 0 512
aio_write 0 0
discard 0
discard 0 64k
discard 1M 64k
discard -C 0 64k
discard -q 0 64k
discard 0 x
discard x 0
discard 8M 512
discard 4M 0
discard 0 4G
discard 0 1E
discard 1 3
discard -Z 1 2
discard
discard 1 2 3
discard 0 -1
w 0 512
d 0 512
"""

THE_REST = r"""
foo
foo bar

 length
length x
length -x
l
quit x
q
sleep
sleep x
sleep -1
sleep 10
sleep 1k
sleep 0x5
sleep 010
sleep 08
help read write
help foo
help -v
help quit
help ?
sigraise
sigraise x
sigraise 0
sigraise 65
sigraise 100
sigraise -1
abort x
aio_flush
aio_flush x
flush
flush x
f
truncate
truncate 2M
truncate 8M
truncate x
truncate -m x 4M
truncate -m x x
truncate -m off 4M
truncate -m
truncate -m full 4M
truncate -m falloc 6M
truncate -m falloc 2M
truncate -Z 4M
truncate 4M 4M
truncate 100
truncate 1
truncate 0
t 5M
alloc
alloc 0
alloc 1
alloc 0 1
alloc 0 0
alloc 0 4M
alloc 0 8M
alloc 8M
alloc 4M
alloc x
alloc 0 x
alloc 0 3G
alloc -1
alloc -1k
alloc 0 1E
alloc 64k 128k
alloc 960k 128k
alloc 0 512 512
a
map
map x
info
info x
i
close x
close
c
zone_report 0 1
zone_report 0
zone_report x 1
zone_open 0 1
zone_close 0 512
zone_finish 0 512
zone_reset 0 512
zone_append 0 512
zone_append 0 512 512
zone_report -Z 2
zone_reset 0 x
zrp 0 1
open
open x
break pwritev A
break foo
resume A
remove_break A
remove_break
reopen
reopen -r
reopen -w
reopen -rw
reopen -r -r
reopen -c writethrough
reopen -c unsafe
reopen -c bad
reopen -o foo=on
reopen -o cluster_size=4k
reopen foo
reopen -Z
reopen -o driver=vmdk
reopen -o read-only=on -r
reopen -c none -o cache.direct=on
reopen -o discard=unmap
reopen -o discard=foo
reopen -o detect-zeroes=on
reopen -o detect-zeroes=unmap
reopen -o node-name=foo
reopen -o file.filename=y
reopen -o file.locking=off
"""

QCOW2_ONLY = r"""
read -b 0 512
read -b 1 512
read -b 0 1
write -b 0 4k
write -c 0 4k
reopen -o lazy-refcounts=on
reopen -o lazy-refcounts=x
reopen -o overlap-check=none
reopen -o overlap-check=foo
reopen -o overlap-check.main-header=off
reopen -o l2-cache-size=1M
reopen -o l2-cache-size=x
reopen -o pass-discard-other=on
reopen -o cache-clean-interval=0
reopen -o cache.no-flush=on
reopen -o data-file=x
"""

RAW_ONLY = r"""
read -b 0 512
write -b 0 4k
write -c 0 4k
truncate -m metadata 5M
truncate 7E
reopen -o offset=1M
reopen -o offset=5M
reopen -o size=1000
reopen -o offset=1M,size=1M
reopen -o offset=1M,size=4M
"""

SESSIONS = [
    "length\nread 0 512\nfoo\n\n   \nquit\nlength\n",
    "length",
    "close\nlength\nread 0 512\nmap\ninfo\naio_flush\nflush\nzone_report 0 1\nbreak x A\n"
    "reopen\nalloc\nread\nclose\nhelp quit\nsleep 1\n",
    "write -P 1 0 64k\nwrite -P 2 64k 64k\nreopen -r\nwrite 0 512\nwrite\nwrite x x\n"
    "writev 0 512\naio_write 0 512\ntruncate 5M\ndiscard 0 512\nflush\nreopen -w\n"
    "write -P 3 0 512\nread -P 3 0 512\nread -P 1 512 65024\nread -P 2 64k 64k\nmap\n",
    "write -P 1 0 1M\nwrite -z 64k 64k\ndiscard 128k 64k\nmap\nalloc 0 1M\nread -P 1 0 64k\n"
    "read -P 0 64k 128k\nwrite -P 9 100k 100k\nread -P 9 100k 100k\nread -P 0 200k 50k\nmap\n",
    "truncate 5M\nlength\nread -P 0 4M 1M\ntruncate 2M\nlength\nmap\ntruncate 4M\n"
    "read -P 0 2M 2M\nread -P 7 1M 1M\n",
    "write -s pattern 0 3000\nread -v 1000 64\nwrite -P 4 1 1\nread -v 0 16\n",
    "close\nopen\nopen a b\nopen -Z disk\nopen -t bad disk\nopen -d bad disk\nopen -i bad disk\n"
    "open nofile\nopen -k disk\nopen -C -r disk\nopen -U disk\nopen -o driver=nope disk\n"
    "open -o driver=raw\nopen -o driver=raw,file.filename=disk disk\nopen -o file=x\n"
    "open json:{}\nopen -- -x\nopen foo:bar\nopen --help\n",
    "close\nopen -o driver=raw disk\nopen disk\nlength\nread -v 0 16\nclose\n"
    "open -o driver=raw,file.driver=file,file.filename=disk\nlength\nclose\n"
    "open -r -o driver=raw disk\nwrite 0 512\nread -v 0 16\nclose\n"
    "open -o driver=raw,offset=512 -o size=1k disk\nlength\nwrite 1k 1\nwrite -P 8 1023 1\n",
    "close\nopen -s -o driver=raw disk\ninfo\nwrite -P 5 0 1M\nread -P 5 0 1M\n"
    "map\nclose\nopen -o driver=raw disk\nread -v 0 16\n",
    "open -o x\nclose\nopen -o x\nopen -o no-x,driver=raw disk\n",
]
"""Fed to the standard input."""

SLOW_REQUESTS = [
    "aio_write -P 5 0 64k\naio_flush\naio_read -P 5 0 64k\naio_flush\naio_write -z 0 64k\n"
    "aio_flush\nread -P 0 0 64k\n",
    "aio_write -P 5 0 64k\nclose\nlength\n",
    "aio_read -v 0 16\naio_flush\naio_read -P 1 0 512\naio_flush\naio_read 8M 1\naio_flush\nfoo\n",
]
"""The same with requests in flight: prompts may come before reports or after them."""

STARTS = """
-Z
--foo
a b
nofile
-f nope disk
-t bad disk
-d bad disk
-i bad disk
-c
-c length
-f raw --image-opts disk
--image-opts k.q -c length
--image-opts driver=raw,file.filename=disk -c length -c info
--image-opts driver=raw,file.filename=disk -r -c info
-U -f raw disk -c length
-U -r -f raw disk -c length
-k -f raw -c length disk
-i native -f raw -c length disk
-k -n -f raw -c length disk
--object secret,id=s0 -f raw -c length disk
--object secret,id=s0,data=x -f raw -c length disk
--object foo,id=s0 -f raw -c length disk
-s -f raw -c length -c info disk
-s -r -f raw -c length disk
-C -f raw -c length disk
-C -r -f raw -c length disk
-n -f raw disk -c length
-m -f raw disk -c length -c read\\ 0\\ 512
-t none -f raw disk -c write\\ 3\\ 700
-t directsync -f raw disk -c write\\ 3\\ 700
-t unsafe -f raw disk -c write\\ 3\\ 700
-d unmap -f raw disk -c discard\\ 0\\ 64k
-d on -f raw disk -c length
-d off -f raw disk -c length
-i threads -f raw disk -c length
-i io_uring -f raw disk -c length
-c quit -c length -f raw disk
-c foo -c length -f raw disk
-c foo -c quit -f raw disk
--cmd length -f raw disk
--cm length -f raw disk
--read-only -f raw disk -c info -c write\\ 0\\ 512
json:{} -c length
-s nofile
foo:bar
-f qcow2 pattern
pattern -c length
pattern -r -c length
-V
-h
"""
"""Command lines, quoted as for a shell."""
