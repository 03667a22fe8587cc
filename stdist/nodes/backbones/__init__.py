"""Published forecasters of nodes: a file each, with the network, its spec and the options a run's ``model:`` takes."""
