"""Engine directories: a model that was quantised and packed ahead of time, checked, and mapped when it runs."""
