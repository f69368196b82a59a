"""The life of exec sessions: manager, store, pump, event bus."""
