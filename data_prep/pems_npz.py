"""Reader of PEMS03, PEMS04, PEMS07 and PEMS08: loop detectors of California's highways, one npz file each.

The data's facts: array ``data`` (T, N, C), 5 minutes, no time stamps and no ids. C = 3 is flow (vehicles in 5
minutes, over all lanes), occupancy (share of time, 0 … 1) and speed (mile/h); C = 1 is flow alone.

| | N | C | T | first day | days |
|---|---|---|---|---|---|
| PEMS03 | 358 | 1 | 26,208 | 2018-09-01 | 91 |
| PEMS04 | 307 | 3 | 16,992 | 2018-01-01 | 59 |
| PEMS07 | 883 | 1 | 28,224 | 2017-05-01 | 98 (papers say until 31 August, the file ends on 6 August) |
| PEMS08 | 170 | 3 | 17,856 | 2016-07-01 | 62 |

A CSV of edges (``from,to,cost``; PEMS03: ``from,to,distance``) names nodes by position, counted from 0; that
of PEMS03 names stations, whose ids in the data's order are the lines of PEMS03.txt (``--node-ids``).

What is made of it: a zero is a measured zero, since a flow of 0 is mostly a real night; the gaps of the
detectors were filled upstream and cannot be told from measurements any more. NaN is missing.
"""

from data_prep.npz_nodes import node_reader

plan = node_reader(
    "pems-npz",
    "data",
    {1: ("flow",), 3: ("flow", "occupancy", "speed")},
    minutes=5,
    units="as measured by PeMS",
    example="2018-01-01 (PEMS04; 2018-09-01 PEMS03, 2017-05-01 PEMS07, 2016-07-01 PEMS08)",
)
