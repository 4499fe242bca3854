"""What every layer sees of a text, and what the loss minds: sums and gradients, layer by layer."""
