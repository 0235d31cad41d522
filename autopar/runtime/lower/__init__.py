"""From a plan and a graph to one stage's two local torch.fx graphs. Process groups are known by name only, and nothing here
holds the state of a training."""
