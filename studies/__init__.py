"""What the memory formats do to training: fidelity of the states, and losses seed by seed."""
