"""A file for each benchmark, run as `python -m benchmarks.NAME` (docs/benchmarks.md).

workloads/ is what is sent, common/ what benchmarks share (machine, options, servers, sides, figures, tables), peers/
the other sides' scripts, which run in environments of their own, and results/ what was measured.
"""
