"""The loss from a fraction of the pairs: blocks of tokens, a control variate for the other pairs, and its error."""
