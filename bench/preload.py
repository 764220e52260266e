"""What the processes of all cases need, imported once, before they are forked."""

import torch._dynamo  # noqa: F401 (the constructor of every torch optimizer imports it: seconds)

import bench.worker  # noqa: F401
