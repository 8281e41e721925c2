"""What tools/analysis_tools/benchmark.py is made of: who is timed, and how is measured."""
