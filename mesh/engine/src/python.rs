//! The private Python module `mesh._native`.

use pyo3::prelude::*;

/// Runs the engine with the given arguments (no program name) and returns its exit status.
/// The interpreter lock is released for the whole run.
#[pyfunction]
fn engine_main(py: Python<'_>, argv: Vec<String>) -> i32 {
    py.detach(|| crate::daemon::main(&argv))
}

/// BLAKE2s-256, for tests against another implementation.
#[pyfunction]
fn blake2s(data: Vec<u8>) -> Vec<u8> {
    crate::crypto::hash(&[&data]).to_vec()
}

/// X25519 public key of a private key, for tests against another implementation.
#[pyfunction]
fn x25519_public(private: [u8; 32]) -> Vec<u8> {
    crate::crypto::SecretKey::from_bytes(private).public().to_vec()
}

#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("VERSION", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(engine_main, m)?)?;
    m.add_function(wrap_pyfunction!(blake2s, m)?)?;
    m.add_function(wrap_pyfunction!(x25519_public, m)?)
}
