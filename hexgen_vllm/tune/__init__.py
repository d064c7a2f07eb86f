"""Finds the knobs of a policy by playing recent workflows in the simulator."""
