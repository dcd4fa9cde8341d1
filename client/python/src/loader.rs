//! The native loader: one attachment to a daemon, for `robocache/_loader.py`, which decides where to go and when.
//!
//! Whatever waits is outside Python's lock and comes back about every 100 ms to see whether a signal (Ctrl-C) came.
//! The mutex is never waited for with Python's lock held, so the two cannot wait for each other.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use robocache::gpu::GpuKind;
use robocache::{ConnectError, LoaderBuilder, LoaderError, LoaderInfo, Next, Position};
use robocache_wire::spec::LoaderSpec;

use crate::batch::Batch;
use crate::errors::{self, LoaderClosed, RequestError, RoboCacheError};

/// How long a wait keeps signals waiting.
const SLICE: Duration = Duration::from_millis(100);

#[pyclass(frozen, module = "robocache._robocache")]
pub(crate) struct Loader {
    /// None once closed.
    attached: Mutex<Option<robocache::Loader>>,
    keys: Py<PyTuple>,
    info: String,
    socket: PathBuf,
}

impl Loader {
    fn lock(&self) -> MutexGuard<'_, Option<robocache::Loader>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next batch of one epoch, as asked of a loader that may be elsewhere by now.
fn next_of(attached: Option<&mut robocache::Loader>, epoch: u64, limit: Duration) -> Result<Next, Ended> {
    let loader = attached.ok_or(Ended::Closed)?;
    if loader.epoch() == epoch { Ok(loader.next_timeout(limit)?) } else { Ok(Next::EpochEnd) }
}

/// Why there is no batch and no end of the epoch either.
enum Ended {
    Closed,
    Failed(LoaderError),
}

impl From<LoaderError> for Ended {
    fn from(error: LoaderError) -> Self {
        Self::Failed(error)
    }
}

impl From<Ended> for PyErr {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Closed => LoaderClosed::new_err("this loader was closed; make a new one"),
            Ended::Failed(error) => errors::of_loader(&error),
        }
    }
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (spec, *, manifest = None, socket = None, near = None, program = None))]
    fn new(
        py: Python<'_>,
        spec: &str,
        manifest: Option<&str>,
        socket: Option<PathBuf>,
        near: Option<PathBuf>,
        program: Option<PathBuf>,
    ) -> PyResult<Self> {
        let mut spec: LoaderSpec = serde_json::from_str(spec)
            .map_err(|error| RequestError::new_err(format!("the loader's arguments: {error}")))?;
        if let Some(manifest) = manifest {
            spec.manifest = Some(toml_of(manifest)?);
        }
        let mut builder = LoaderBuilder::from_spec(spec);
        if let Some(program) = program {
            builder = builder.embedded(program);
        }
        let loader = match (socket, near) {
            (Some(socket), _) => connect(py, &builder.socket(socket)),
            // Where a loader like this one was attached when it was forked or pickled. Only a hint.
            (None, Some(near)) => match connect(py, &builder.clone().socket(near)) {
                Err(Unconnected::Error(ConnectError::NoDaemon { .. })) => connect(py, &builder),
                other => other,
            },
            (None, None) => connect(py, &builder),
        }?;
        let info = info_of(&loader)?;
        let names = loader.columns().iter().map(|column| column.name.as_str());
        let keys = PyTuple::new(py, names.collect::<Vec<_>>())?.unbind();
        let socket = loader.socket().to_owned();
        Ok(Self { attached: Mutex::new(Some(loader)), keys, info, socket })
    }

    /// The next batch of `epoch`; None at its end, or if the loader is in another epoch already.
    fn next(&self, py: Python<'_>, epoch: u64) -> PyResult<Option<Batch>> {
        // A batch that is ready costs no switch of threads.
        let mut next = match self.attached.try_lock() {
            Ok(mut attached) => next_of(attached.as_mut(), epoch, Duration::ZERO)?,
            Err(_) => Next::TimedOut,
        };
        loop {
            match next {
                Next::Batch(batch) => return Ok(Some(Batch::new(batch, self.keys.clone_ref(py)))),
                Next::EpochEnd => return Ok(None),
                Next::TimedOut => py.check_signals()?,
            }
            next = py.detach(|| next_of(self.lock().as_mut(), epoch, SLICE))?;
        }
    }

    fn seek(&self, py: Python<'_>, epoch: u64, consumed: u64) -> PyResult<()> {
        py.detach(|| {
            let mut attached = self.lock();
            let loader = attached.as_mut().ok_or(Ended::Closed)?;
            Ok::<_, Ended>(loader.seek(Position { epoch, consumed })?)
        })?;
        Ok(())
    }

    /// The daemon's answer to `Open`, as JSON.
    fn info(&self) -> &str {
        &self.info
    }

    fn socket(&self) -> String {
        self.socket.to_string_lossy().into_owned()
    }

    /// The daemon's status, as JSON, over a connection of its own.
    fn status(&self, py: Python<'_>) -> PyResult<String> {
        let value = py
            .detach(|| robocache::admin::status(&self.socket))
            .map_err(|error| errors::of_connect(&error))?;
        Ok(value.to_string())
    }

    fn close(&self, py: Python<'_>) {
        // An embedded daemon is waited for.
        py.detach(|| drop(self.lock().take()));
    }
}

/// The daemon's answer as JSON. Of a GPU it has what tells which one it is, and none of the handles.
fn info_of(loader: &robocache::Loader) -> PyResult<String> {
    let failed = |error| RoboCacheError::new_err(format!("the daemon's answer: {error}"));
    let mut info = serde_json::to_value(LoaderInfo { gpu: None, ..loader.info().clone() }).map_err(failed)?;
    if let Some(gpu) = loader.gpu() {
        let kind = match gpu.kind {
            GpuKind::Cuda => "cuda",
            GpuKind::Sim => "sim",
        };
        info["gpu"] = serde_json::json!({
            "kind": kind, "ordinal": gpu.ordinal, "uuid": gpu.uuid, "name": gpu.name,
        });
    }
    serde_json::to_string(&info).map_err(failed)
}

/// No loader, because of the daemon or because of a signal.
enum Unconnected {
    Error(ConnectError),
    Signal(PyErr),
}

impl From<Unconnected> for PyErr {
    fn from(unconnected: Unconnected) -> Self {
        match unconnected {
            Unconnected::Error(error) => errors::of_connect(&error),
            Unconnected::Signal(error) => error,
        }
    }
}

fn connect(py: Python<'_>, builder: &LoaderBuilder) -> Result<robocache::Loader, Unconnected> {
    let mut signal = None;
    let connected = py.detach(|| {
        builder.connect_with(|| match Python::attach(|py| py.check_signals()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                signal = Some(error);
                ControlFlow::Break(())
            }
        })
    });
    match signal {
        Some(error) => Err(Unconnected::Signal(error)),
        None => connected.map_err(Unconnected::Error),
    }
}

/// A manifest that was a dict, as TOML text: what the daemon reads.
fn toml_of(json: &str) -> PyResult<String> {
    let refuse = |error: &dyn std::fmt::Display| RequestError::new_err(format!("the manifest: {error}"));
    let value: toml::Value = serde_json::from_str(json).map_err(|error| refuse(&error))?;
    toml::to_string(&value).map_err(|error| refuse(&error))
}
