"""Reader of flows by zone: one npz file with one array (T, N, C) over consecutive frames, no time stamps.

An example is the taxi traffic of 69 zones of Manhattan: ``arr_0`` (17544, 69, 2), hourly, 2019-01-01 to
2020-12-31 local time without change of clocks (731 x 24 frames), trips into and out of a zone as the file's
name says (``inoutflow``), no missing value. Its zones.csv (``zone_id,graph_id,zone_name``) is the table of
nodes, its adjacency.csv has a header of positions and weights 0 and 1. The collapse of traffic in March 2020
is real: a training span before it and a test span after it differ.

What is made of it: zeros are measured, NaN is missing.
"""

from data_prep.npz_nodes import node_reader

CHANNELS = {1: ("flow",), 2: ("flow_in", "flow_out")}

plan = node_reader("zones-npz", None, CHANNELS, minutes=60, units="trips", example="2019-01-01")
