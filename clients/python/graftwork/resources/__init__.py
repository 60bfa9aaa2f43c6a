"""client.adapters, client.datasets, client.strategies and client.tuning; one file each, with its async twin."""
