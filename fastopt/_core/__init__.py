"""What every part of the package stands on: arrays, options, parameters, state, and the seam for devices."""
