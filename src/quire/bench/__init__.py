"""Measuring: workloads, a clock for each floor, a peer to compare with, a report that says how it was measured."""
