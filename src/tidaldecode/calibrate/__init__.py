"""From a model and a text towards a plan: what the layers attend to, and what each would choose."""
