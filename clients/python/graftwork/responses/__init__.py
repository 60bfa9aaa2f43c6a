"""Protobuf answers to the values of types/; a file each, as there."""
