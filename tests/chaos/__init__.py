"""What is lost when processes, servers and disks end or hang at the worst moment: nothing that was acknowledged."""
