"""The command `evolvenet`: networks, files and runs from a terminal. May import everything else."""
