"""What every trainer needs around the loss, the same in sd-scripts and in the engine; `term` leads to the rest."""
