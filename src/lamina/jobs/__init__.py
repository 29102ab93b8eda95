"""Work on whole disks: convert, compare, commit, …"""
