"""A federated simulation in ten lines of Python.

    python examples/federated_ten_lines.py       # embedded encoder and text, minutes on two cores
    python examples/federated_ten_lines.py method=fedara num_clients=100 clients_per_round=10 \\
        num_rounds=50 alpha=0.1 model=distilbert-base-uncased dataset=SetFit/20_newsgroups

Every option of `fastrank simulate` is a keyword of `Simulation`; a hub's data set needs
`pip install 'fastrank[data]'`. The run's folder holds what a run from the command line leaves.
"""

import sys

import fastrank

options = {"method": "fedit", "num_clients": 20, "clients_per_round": 4, "num_rounds": 8}
options |= {"local_steps": 10, "alpha": 100.0, "max_eval_examples": 400}
options |= dict(word.split("=", 1) for word in sys.argv[1:])
result = fastrank.Simulation(**options).run()
for row in result.rows:
    print(f"round {row['round']}: accuracy {row['accuracy']:.3f}, {row['bytes_up']:,} bytes up")
print(f"{result.summary['accuracy']:.3f} at the end; the adapter is in {result.output_dir}")
