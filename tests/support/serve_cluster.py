"""A Ray cluster of two nodes on this machine, which say that they have a GPU each.

Prints its address, then what became of a line read: `kill` ends the second node."""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
other = cluster.add_node(num_cpus=1, num_gpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "kill\n":
        cluster.remove_node(other, allow_graceful=False)
        print("killed", flush=True)
cluster.shutdown()
