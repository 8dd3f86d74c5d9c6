// Checks manifests, a JSON list on stdin, by the classes of @kubernetes-models; prints what is wrong, one line each.
import {readFileSync} from "node:fs";

const PACKAGES = {"keda.sh": "keda", "monitoring.coreos.com": "prometheus-operator", "gateway.networking.k8s.io": "gateway-api"};

for (const manifest of JSON.parse(readFileSync(0))) {
  const [group, version] = manifest.apiVersion.split("/");
  const path = `@kubernetes-models/${PACKAGES[group]}/${group}/${version}/${manifest.kind}.js`;
  const module = await import(`${process.env.QVQ_NODE_MODULES}/${path}`);
  const Model = module[manifest.kind] ?? module.default[manifest.kind];
  try {
    new Model(manifest).validate();
  } catch (error) {
    console.log(`${manifest.kind}: ${error.message}`);
  }
}
