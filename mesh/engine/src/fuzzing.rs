//! Entry points for fuzzing, shared by libFuzzer (`fuzz/`) and the mutation test on stable Rust.
//! Each takes arbitrary bytes and panics only when a promise is broken.

use std::io::BufReader;
use std::sync::Arc;

use crate::cookie::Sender;
use crate::noise::{TYPE_COOKIE, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE};
use crate::offload::{outbound, Buffers, Coalescer, Segmenter, Span, VnetHdr, VNET_LEN};
use crate::packet::{parse, transport, transport_sum_ok};
use crate::server::{read_request, Request};
use crate::sim::{inner, Datagram, Memory, Net, Node, A, B};

/// Reads a little-endian length from the front and splits off that many bytes.
fn take<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = data.split_at_checked(2)?;
    let len = usize::from(u16::from_le_bytes([len[0], len[1]])).min(rest.len());
    let (piece, rest) = rest.split_at(len);
    *data = rest;
    Some(piece)
}

/// Datagrams from the network: nothing is delivered, nothing is answered, nothing panics.
pub fn datagrams(mut data: &[u8]) {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.run(20);
    let index =
        net.log.iter().rev().find(|(_, d)| d.bytes[0] == TYPE_DATA).map(|(_, d)| d.bytes[4..8].to_vec());
    let mut batch = Vec::new();
    while let Some(piece) = take(&mut data) {
        let mut bytes = piece.to_vec();
        // Reach past the session look-up: only a tag no fuzzer can make is then missing.
        if bytes.len() >= 8 && bytes[0] == TYPE_DATA && bytes[4] & 1 == 0 {
            if let Some(i) = &index {
                bytes[4..8].copy_from_slice(i);
            }
        }
        let from = if bytes.len() % 2 == 0 { A } else { "203.0.113.5:5" };
        batch.push(Datagram {
            from: from.parse().expect("an address"),
            to: B.parse().expect("an address"),
            bytes,
        });
        if batch.len() == 16 {
            break;
        }
    }
    let seen = net.nodes[1].delivered.len();
    let recorded: Vec<Vec<u8>> = net.log.iter().map(|(_, d)| d.bytes.clone()).collect();
    net.nodes[1].receive(net.now, &batch);
    net.nodes[1].pump(net.now);
    assert_eq!(net.nodes[1].delivered.len(), seen, "delivered forged data");
    let replayed = |b: &Datagram| b.bytes.first() == Some(&TYPE_INITIATION) && recorded.contains(&b.bytes);
    assert!(net.nodes[1].wire.sent.is_empty() || batch.iter().any(replayed), "answered a stranger");
}

/// Handshake messages whose mac1 is right, so that they reach the Diffie-Hellman and the AEADs:
/// without the peer's static key none is believed. Each piece is laid over a genuine message.
pub fn handshake(mut data: &[u8]) {
    let mut net = Net::pair();
    net.nodes[0].send(net.now, &inner(0, 1));
    net.nodes[0].pump(net.now);
    let genuine = net.nodes[0].wire.sent.pop().expect("an initiation");
    let index: [u8; 4] = genuine.bytes[4..8].try_into().expect("4 bytes");
    let targets = [net.nodes[1].public, net.nodes[0].public];
    for round in 0..8 {
        let Some(piece) = take(&mut data) else { break };
        // To node 1 initiations, to node 0 (which waits for one) responses and cookie replies.
        let (to, mut bytes) = match piece.first().map_or(0, |b| b % 3) {
            0 => (1, genuine.bytes.clone()),
            1 => (0, [&[TYPE_RESPONSE, 0, 0, 0, 9, 9, 9, 9][..], &index, &[0; 80]].concat()),
            _ => (0, [&[TYPE_COOKIE, 0, 0, 0][..], &index, &[0; 56]].concat()),
        };
        let laid = piece.get(1..).unwrap_or_default();
        for (b, x) in bytes[8..].iter_mut().zip(laid) {
            *b ^= x;
        }
        if bytes[0] != TYPE_COOKIE {
            // mac2 is looked at only under load.
            let mac2 = bytes.len() - 16;
            bytes[mac2..].fill(0);
            Sender::default().add_macs(net.now, &targets[1 - to], &mut bytes);
        }
        if bytes == genuine.bytes {
            continue;
        }
        let peers = [B, A];
        net.nodes[to].receive(
            net.now + round,
            &[Datagram {
                from: peers[to].parse().expect("an address"),
                to: peers[1 - to].parse().expect("an address"),
                bytes,
            }],
        );
        net.nodes[to].pump(net.now + round);
        assert!(net.nodes[to].wire.sent.is_empty(), "answered a forged handshake");
    }
    assert!(net.nodes.iter().all(|n| n.delivered.is_empty()));
    assert!(!net.session_up(0) && !net.session_up(1), "a session from a forged handshake");
    // It still takes the genuine one.
    net.nodes[1].receive(net.now + 100, &[genuine]);
    net.nodes[1].pump(net.now + 100);
    assert_eq!(net.nodes[1].wire.sent.len(), 1);
}

/// A read from the TUN: virtio header and packet. Every segment is a packet of its own.
pub fn tun_read(data: &[u8]) {
    let Some((head, packet)) = data.split_at_checked(VNET_LEN) else { return };
    let vnet = VnetHdr::read(head);
    let mut buf = packet.to_vec();
    let Some(i) = parse(&buf) else { return };
    buf.truncate(i.len);
    let mut s = Segmenter::default();
    if outbound(&vnet, &mut buf, &mut s) != Some(true) {
        return;
    }
    let mut payload = 0;
    for n in 0..s.count {
        let at = s.prepare(n, &mut buf);
        let segment = &buf[at..at + s.len(n)];
        let whole = parse(segment).expect("a segment is a packet");
        assert_eq!((whole.len, whole.src, whole.dst), (segment.len(), i.src, i.dst));
        payload += segment.len();
    }
    assert!(payload >= i.len, "bytes were lost");
    let mut node = Node::new(A, 1);
    node.send(1, packet);
}

/// Decrypted packets: joining and cutting again gives exactly what went in, flow by flow.
pub fn coalesce(mut data: &[u8]) {
    let mut packets = Vec::new();
    while let Some(piece) = take(&mut data) {
        if let Some(i) = parse(piece) {
            packets.push(piece[..i.len].to_vec());
        }
        if packets.len() == 64 {
            break;
        }
    }
    let mut mem = Memory(packets.clone());
    let mut c = Coalescer::new(true, true);
    for (buf, p) in packets.iter().enumerate() {
        c.push(&mem, Span { buf, off: 0, len: p.len() });
    }
    c.finish(&mut mem);
    let mut out: Vec<Vec<u8>> = Vec::new();
    for g in c.groups() {
        let mut joined: Vec<u8> = g.spans.iter().flat_map(|s| mem.bytes(*s).to_vec()).collect();
        let mut s = Segmenter::default();
        match outbound(&g.vnet, &mut joined, &mut s) {
            Some(true) => {
                for n in 0..s.count {
                    let at = s.prepare(n, &mut joined);
                    let piece = joined[at..at + s.len(n)].to_vec();
                    let t = transport(&piece).expect("a transport packet");
                    assert!(transport_sum_ok(&piece, &t) || t.proto == crate::packet::UDP);
                    out.push(piece);
                }
            }
            Some(false) => out.push(joined),
            None => panic!("joined into something that cannot be cut"),
        }
    }
    assert_eq!(out.len(), packets.len());
    // Ids under DF, a moved PSH and the IP checksum may differ; length and payload may not.
    let key = |p: &Vec<u8>| (p.len(), transport(p).map(|t| p[t.header_len..].to_vec()));
    let (mut a, mut b): (Vec<_>, Vec<_>) = (out.iter().map(key).collect(), packets.iter().map(key).collect());
    a.sort();
    b.sort();
    assert_eq!(a, b);
}

/// A UAPI client: refused requests change nothing, and every route has a configured owner.
pub fn uapi(data: &[u8]) {
    let mut n = Node::new(A, 1);
    let mut input = BufReader::new(data);
    for _ in 0..8 {
        let before = n.core.routes.load_full();
        match read_request(&mut input) {
            Ok(Request::Set(text)) => {
                if n.set(1, &text.lines().filter(|l| !l.is_empty()).collect::<Vec<_>>().join("\n")).is_err() {
                    assert!(Arc::ptr_eq(&before, &n.core.routes.load_full()), "half applied");
                }
            }
            Ok(Request::Get) => {}
            _ => return,
        }
        let c = crate::peer::lock(&n.core.control);
        for p in c.peers.values() {
            for a in crate::peer::lock(&p.allowed).iter() {
                let owner =
                    n.core.routes.load().lookup(a.addr()).cloned().expect("a route for every allowed-ip");
                assert!(c.peers.contains_key(&owner.public));
            }
        }
    }
}

/// Command lines, separated by newlines.
pub fn command_line(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let args: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Err(e) = crate::daemon::parse_args(&args) {
        assert_eq!(e.exit, crate::error::EXIT_USAGE);
        assert!(!e.to_string().contains('\n'), "one line");
    }
}

pub type Target = fn(&[u8]);

/// All targets, by the name of their corpus folder.
pub const TARGETS: [(&str, Target); 6] = [
    ("datagrams", datagrams),
    ("handshake", handshake),
    ("tun_read", tun_read),
    ("coalesce", coalesce),
    ("uapi", uapi),
    ("command_line", command_line),
];
