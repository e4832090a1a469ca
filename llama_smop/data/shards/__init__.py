"""Clips in webdataset tar shards, for data that outgrows a disk.

A folder of shards holds `clips-000000.tar`, … and `index.json`, which knows every clip's length. So an epoch is planned
before anything is read, as a function of its number and a seed (plan.py), and the clips are then read shard by shard
(read.py). write.py makes the shards, index.py knows where they are.
"""
