"""Experiments on one machine: the command line, the in-process engine, run directories and reports."""
