//! The running engine: the core plus its TUN queues and sockets, shared by all threads.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

use crate::device::{Action, Core};
use crate::gate::Gate;
use crate::sys::EventFd;
use crate::tun::{Offloads, Queue};
use crate::tx::{execute, Tx};
use crate::udp::{bind_all, SocketPair, UdpOptions};

pub struct Engine {
    pub core: Core,
    pub queues: Vec<Queue>,
    pub offloads: Offloads,
    pub udp: UdpOptions,
    /// One pair per worker; empty until the first bind. Swapped whole.
    pub sockets: ArcSwap<Vec<SocketPair>>,
    pub port: AtomicU16,
    pub mark: AtomicU32,
    /// Serialises configuration changes.
    pub configuring: Mutex<()>,
    /// One per worker thread.
    pub wakes: Vec<EventFd>,
    pub control_wake: Arc<EventFd>,
    /// Where all threads wait while the state is handed over.
    pub gate: Gate,
    stop: AtomicBool,
}

impl Engine {
    pub fn new(
        core: Core,
        queues: Vec<Queue>,
        offloads: Offloads,
        udp: UdpOptions,
        wakes: Vec<EventFd>,
        control_wake: Arc<EventFd>,
    ) -> Self {
        Self {
            core,
            queues,
            offloads,
            udp,
            sockets: ArcSwap::from_pointee(Vec::new()),
            port: AtomicU16::new(0),
            mark: AtomicU32::new(0),
            configuring: Mutex::new(()),
            wakes,
            control_wake,
            gate: Gate::default(),
            stop: AtomicBool::new(false),
        }
    }

    pub fn stopping(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Makes all threads wait at the gate after what they are doing.
    pub fn pause(&self) {
        self.gate.close();
        self.wake_workers();
        self.control_wake.signal();
    }

    /// Ends all threads.
    pub fn shutdown(&self) {
        self.stop.store(true, Relaxed);
        self.gate.open();
        self.wake_workers();
        self.control_wake.signal();
    }

    fn wake_workers(&self) {
        for w in &self.wakes {
            w.signal();
        }
    }

    /// Binds new sockets and swaps them in; on failure the old ones stay. `None` keeps the port.
    /// The caller holds `configuring`.
    pub fn rebind(&self, port: Option<u16>) -> io::Result<()> {
        let bound = !self.sockets.load().is_empty();
        let wanted = port.unwrap_or_else(|| self.port.load(Relaxed));
        if bound && (port.is_none() || (wanted != 0 && wanted == self.port.load(Relaxed))) {
            return Ok(());
        }
        let (sockets, port) = bind_all(self.queues.len(), wanted, self.mark.load(Relaxed), self.udp)?;
        self.sockets.store(Arc::new(sockets));
        self.port.store(port, Relaxed);
        self.wake_workers();
        Ok(())
    }

    /// Sets the firewall mark of everything sent from now on.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        for s in self.sockets.load().iter().flat_map(SocketPair::each) {
            s.set_mark(mark)?;
        }
        self.mark.store(mark, Relaxed);
        Ok(())
    }

    /// Carries out what the core asked for.
    pub fn execute(&self, actions: &mut Vec<Action>, tx: &mut Tx, now: u64) {
        let sockets = self.sockets.load_full();
        let Some(mut pair) = sockets.first() else {
            actions.clear();
            return;
        };
        execute(&self.core, actions, tx, &mut pair, now);
    }
}
