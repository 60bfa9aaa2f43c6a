"""A fuzzer: mutated messages over every method, and mutated files, against a real server. See __main__.py."""
