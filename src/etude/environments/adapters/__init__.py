"""Other people's environments: TRL's duck type, Gymnasium, OpenEnv, verifiers."""
