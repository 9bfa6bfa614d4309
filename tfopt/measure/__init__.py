"""Measuring: latency, accuracy, statistics, and the machine they were taken on."""
