"""DispersionRegularizer in third-party training loops; each module needs the package of the same name."""
