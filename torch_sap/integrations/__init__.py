"""Training frameworks that torch_sap works inside of; each module here imports its own."""
