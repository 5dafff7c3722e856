"""Micro-benchmarks, importable as fastrank.bench."""
